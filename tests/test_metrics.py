import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import metrics
from errors import UnusableInput

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 1, 0, 1])


def overconfident(scale, n=4000, num_classes=10):
    """Logits whose labels are drawn from their own softmax, then multiplied by `scale`."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return scale * logits, labels


def test_metrics_equal_hand_computed_values():
    assert metrics.top1(LOGITS, LABELS) == 0.5
    assert metrics.confusion_matrix(LOGITS, LABELS).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    scores = metrics.class_scores(metrics.confusion_matrix(LOGITS, LABELS))
    assert {values.dtype for values in scores.values()} == {torch.float64}
    # Class 0 is hit once in one prediction, class 1 once in two; class 2 is predicted in vain.
    expected = {"precision": [1, 0.5, 0], "recall": [0.5, 0.5, 0], "f1": [2 / 3, 0.5, 0]}
    for name, values in expected.items():
        assert scores[name].tolist() == pytest.approx(values)
    e = math.e
    losses = math.log(e**2 + 2) - 2, math.log(e + 2) - 1, math.log(e**3 + 2), math.log(e + 2)
    loss = metrics.summarize(LOGITS, LABELS, None, classes="abc")["loss"]
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-7)


def test_confusion_matrix_equals_a_loop_and_holds_the_other_accuracies():
    logits, labels = overconfident(1.0, n=500)
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    for true, predicted in zip(labels, logits.argmax(1), strict=True):
        matrix[true, predicted] += 1
    assert metrics.confusion_matrix(logits, labels).equal(matrix)
    assert metrics.top1(logits, labels) == matrix.trace() / 500
    scores = metrics.class_scores(matrix)
    assert scores["recall"].equal(matrix.diag() / matrix.sum(1).double())
    harmonic = 2 / (1 / scores["precision"] + 1 / scores["recall"])
    torch.testing.assert_close(scores["f1"], harmonic, rtol=1e-12, atol=0)


def two_class(probability, num_correct, n):
    """N images of class 0 or 1, all predicted as class 0 with one probability."""
    logits = torch.tensor([probability, 1 - probability], dtype=torch.float64).log().expand(n, 2)
    return logits, (torch.arange(n) >= num_correct).long()


@pytest.mark.parametrize(
    ("num_correct", "expected"),
    [(8, 0.0), (5, 0.3), (10, 0.2)],
    ids=["calibrated", "over", "under"],
)
def test_calibration_error_of_known_constructs(num_correct, expected):
    bins = metrics.calibration_bins(*two_class(0.8, num_correct, 10))
    assert bins.count.sum() == bins.count[11] == 10  # (11/15, 12/15] closes on its right
    assert metrics.expected_calibration_error(bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_equals_a_loop_over_the_bins():
    logits, labels = overconfident(2.0, n=300)
    confidence, predicted = logits.softmax(1).max(1)
    expected = 0.0
    for lower in range(15):
        inside = (confidence > lower / 15) & (confidence <= (lower + 1) / 15)
        gap = (confidence[inside] - (predicted == labels)[inside].double()).sum().abs()
        expected += gap.item() / 300
    bins = metrics.calibration_bins(logits, labels)
    assert metrics.expected_calibration_error(bins) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_temperature_recovers_a_known_scaling(scale):
    logits, labels = overconfident(scale)
    assert metrics.fit_temperature(logits.float(), labels) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_temperature_is_a_minimum_within_its_range(scale):
    logits, labels = overconfident(scale, n=200)
    fitted = metrics.fit_temperature(logits, labels)
    best = F.cross_entropy(logits / fitted, labels)
    for other in (1.0, *(min(max(fitted * f, 0.05), 20) for f in (0.5, 0.99, 1.01, 2))):
        assert best <= F.cross_entropy(logits / other, labels) + 1e-12


def test_no_temperature_fits_where_all_are_right_or_all_wrong():
    n = metrics.MIN_CALIBRATION
    logits, labels = two_class(0.9, num_correct=n, n=n)
    assert metrics.fit_temperature(logits, labels) is None
    assert metrics.fit_temperature(*overconfident(500.0, n=n)) is None
    assert metrics.fit_temperature(logits, 1 - labels) is None


def test_few_validation_images_give_no_temperature():
    logits, labels = overconfident(2.0, n=metrics.MIN_CALIBRATION)
    assert metrics.fit_temperature(logits, labels) is not None
    assert metrics.fit_temperature(logits[1:], labels[1:]) is None


def test_the_interval_of_a_share_is_wide_for_few_images_and_stays_within_0_and_1():
    # Of statsmodels' proportion_confint(8, 8, method="wilson").
    low, high = metrics.wilson_interval(1.0, 8)
    assert (low, high) == pytest.approx((0.6756, 1), abs=1e-4)
    for share in (0.0, 1.0):
        low, high = metrics.wilson_interval(share, np.arange(1, 2000))
        assert 0 <= low.min() < high.max() <= 1
    chance = torch.Generator().manual_seed(0)
    for true, count in ((0.95, 20), (0.8, 100), (0.5, 10)):
        hits = (torch.rand(4000, count, generator=chance) < true).double().mean(1).numpy()
        low, high = metrics.wilson_interval(hits, count)
        assert 0.92 < ((low <= true) & (true <= high)).mean() < 0.985


def test_summary_is_strict_json_and_says_none_for_what_is_missing():
    summary = metrics.summarize(LOGITS, LABELS, None, classes=("a", "b", "c"))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["n"] == 4
    assert summary["top1_interval"] == pytest.approx([0.15, 0.85], abs=5e-4)  # R's prop.test
    assert summary["per_class"] == {"a": 0.5, "b": 0.5, "c": None}
    assert summary["by_class"]["c"] == {"images": 0, "precision": 0, "recall": 0, "f1": 0}
    assert summary["macro"] == pytest.approx({"precision": 0.5, "recall": 1 / 3, "f1": 7 / 18})
    assert summary["top1_tta"] is summary["temperature"] is summary["ece_calibrated"] is None

    logits, labels = overconfident(3.0)
    perfect = torch.eye(10)[labels]
    classes = [str(c) for c in range(10)]
    summary = metrics.summarize(logits, labels, 3.0, logits_tta=perfect, classes=classes)
    assert summary["top1"] < summary["top1_tta"] == 1
    assert summary["ece_calibrated"] < 0.05 < summary["ece"]


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        # What sklearn.metrics.precision_recall_fscore_support(..., average="macro") says of them.
        ([[90, 0], [10, 0]], (0.45, 0.5, 9 / 19)),  # b is never predicted
        ([[2, 1], [0, 0]], (0.5, 1 / 3, 0.4)),  # b has no image but is predicted
        ([[3, 1, 0], [1, 5, 0], [0, 0, 0]], (19 / 24, 19 / 24, 19 / 24)),  # c is neither: left out
    ],
    ids=["never predicted", "no image", "neither"],
)
def test_macro_averages_are_those_of_scikit_learn(matrix, expected):
    pairs = [
        (true, predicted)
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        for _ in range(count)
    ]
    labels = torch.tensor([true for true, _ in pairs])
    logits = F.one_hot(torch.tensor([predicted for _, predicted in pairs]), len(matrix)).double()
    summary = metrics.summarize(logits, labels, None, classes="abc"[: len(matrix)])
    assert tuple(summary["macro"].values()) == pytest.approx(expected)
    if len(matrix) == 3:
        assert summary["by_class"]["c"] == {
            "images": 0,
            "precision": None,
            "recall": None,
            "f1": None,
        }


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        (LOGITS, LABELS[:3], ValueError, "labels"),
        (LOGITS[:0], LABELS[:0], ValueError, "at least 1"),
        (LOGITS[:, :2], LABELS, ValueError, "3 names for 2 classes"),
        (LOGITS * float("nan"), LABELS, UnusableInput, "12 .* diverged"),
    ],
    ids=["shapes", "empty", "too few classes", "nan"],
)
def test_unusable_logits_are_refused(logits, labels, kind, message):
    with pytest.raises(kind, match=message):
        metrics.summarize(logits, labels, None, classes=("a", "b", "c"))
