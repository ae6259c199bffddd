"""Numbers from logits: pure functions on CPU tensors; fractions in [0, 1], losses in nats.

Throughout, `logits` is (N, C) float, `labels` (N,) int64 in [0, C), and sums are float64.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from errors import UnusableInput

MAX_TEMPERATURE = 20.0  # and its reciprocal; beyond them no temperature fits
# A temperature is fitted on at least so many images. Fitted on 200 drawn at random it spreads by 7
# to 11 %, on 50 by 13 to 33 %, on 2 by a factor of two: two pictures made "100.0 %" of a guess.
MIN_CALIBRATION = 200


class CalibrationBins(NamedTuple):
    """Top-label confidence against accuracy in B bins of equal width, each closed on its right."""

    count: Tensor  # (B,) int64: images whose confidence falls into the bin
    confidence: Tensor  # (B,) float64: their mean confidence; 0 in an empty bin
    accuracy: Tensor  # (B,) float64: share of them classified correctly; 0 in an empty bin


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    _check(logits, labels)
    return (logits.argmax(1) == labels).double().mean().item()


def wilson_interval(
    share: np.ndarray | float, count: np.ndarray | float, deviations: float = 1.96
) -> tuple[np.ndarray, np.ndarray]:
    """Where a true share lies of which a sample is known (Wilson 1927).

    Unlike the plain standard error's it has a width where all of three images are right.

    Args:
        share: in the sample.
        count: of the sample, above 0.
        deviations: of the normal distribution; 1.96 are 95 %, 1 is 68 %.

    Returns:
        The lower and the upper end, float64 of the shape of both.
    """
    inverse = deviations**2 / count
    centre = (share + inverse / 2) / (1 + inverse)
    half = deviations / (1 + inverse) * np.sqrt(share * (1 - share) / count + inverse / count / 4)
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)  # but for rounding they are


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts of images, (C, C) int64: rows are true classes, columns predicted ones."""
    _check(logits, labels)
    num_classes = logits.shape[1]
    cells = labels * num_classes + logits.argmax(1)
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(matrix: Tensor) -> dict[str, Tensor]:
    """`precision`, `recall` and `f1` from a `confusion_matrix`, (C,) float64 each.

    Precision is the share of the images predicted as a class that belong to it, recall the share of
    its images that are predicted as it (its accuracy), F1 their harmonic mean. The rule for 0/0 is
    scikit-learn's default: it counts as 0, so that a class that is never predicted has a precision
    of 0; a class that is neither among the labels nor predicted has no scores, NaN.
    """
    matrix = matrix.double()
    hits = matrix.diagonal()
    num_predicted = matrix.sum(0)
    num_true = matrix.sum(1)
    scores = {
        "precision": hits / num_predicted.clamp(min=1),
        "recall": hits / num_true.clamp(min=1),
        "f1": 2 * hits / (num_predicted + num_true).clamp(min=1),
    }
    absent = (num_predicted + num_true) == 0
    return {name: values.masked_fill(absent, math.nan) for name, values in scores.items()}


def calibration_bins(logits: Tensor, labels: Tensor, num_bins: int = 15) -> CalibrationBins:
    """Sorts images into bins ((b-1)/B, b/B] of the probability given to the predicted class.

    These are the equal-width, top-label bins of Guo et al. 2017, "On Calibration of Modern Neural
    Networks" (https://arxiv.org/abs/1706.04599), section 2.
    """
    _check(logits, labels)
    confidence, predicted = logits.double().softmax(1).max(1)
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    count = torch.bincount(bins, minlength=num_bins)
    correct = (predicted == labels).double()
    total_confidence = torch.bincount(bins, weights=confidence, minlength=num_bins)
    total_correct = torch.bincount(bins, weights=correct, minlength=num_bins)
    images = count.clamp(min=1)
    return CalibrationBins(count, total_confidence / images, total_correct / images)


def expected_calibration_error(bins: CalibrationBins) -> float:
    """Mean gap between confidence and accuracy over the bins, weighted by their images.

    Equation 3 of Guo et al. 2017. It grows with the number of bins and shrinks with the number of
    images, so only values from equal bins and equal splits compare.
    """
    gap = (bins.confidence - bins.accuracy).abs()
    return ((bins.count * gap).sum() / bins.count.sum()).item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The T > 0 whose logits / T have the smallest cross-entropy (Guo et al. 2017, section 4.2).

    Fit it on validation logits: on the test set it would flatter the calibration. The loss is
    convex in 1/T, so its slope changes sign once and bisection needs no step size or start.

    Returns:
        None, which means "not calibrated", for fewer than MIN_CALIBRATION images, and where the
        minimum lies beyond [1 / MAX_TEMPERATURE, MAX_TEMPERATURE], as when every image (or none) is
        classified correctly.
    """
    _check(logits, labels)
    if len(labels) < MIN_CALIBRATION:
        return None
    logits = logits.double()
    margins = logits - logits.gather(1, labels[:, None])  # to the label's own logit
    limit = math.log(MAX_TEMPERATURE)
    low = -limit
    high = limit
    for _ in range(50):  # halvings that exhaust float64
        middle = (low + high) / 2
        slope = ((logits / math.exp(middle)).softmax(1) * margins).sum()  # of the loss in 1/T
        if slope > 0:  # 1/T is too large
            low = middle
        else:
            high = middle
    fitted = (low + high) / 2
    return math.exp(fitted) if abs(fitted) < 0.999 * limit else None


def summarize(
    logits: Tensor,
    labels: Tensor,
    temperature: float | None,
    logits_tta: Tensor | None = None,
    *,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Everything `test.json` says about a network's logits, in plain JSON types.

    Args:
        logits: without augmentation.
        labels: of the same images.
        temperature: fitted on the validation split; None where there was none.
        logits_tta: with test-time augmentation; enters `top1_tta` alone.
        classes: C names.

    Returns:
        `n` (images), `loss`, `top1`, `top1_interval` (its 95 % interval, see `wilson_interval`),
        `top1_tta`, `per_class` ({class: accuracy}, None for a class without images), `by_class`
        ({class: its number of `images` and its scores of `class_scores`}, scores None for a class
        that is neither there nor predicted), `macro` (the scores' means over the other classes, as
        scikit-learn's macro averages), `ece`, `temperature` and `ece_calibrated`; None for what is
        missing.

    Raises:
        UnusableInput: the logits are not all finite.
        ValueError: no images, or shapes that disagree.
    """
    if len(classes) != logits.shape[1]:
        raise ValueError(f"{len(classes)} names for {logits.shape[1]} classes")
    ece_calibrated = None
    if temperature is not None:
        ece_calibrated = _ece(logits.double() / temperature, labels)
    matrix = confusion_matrix(logits, labels)
    num_images = matrix.sum(1).tolist()
    scores = class_scores(matrix)
    per_class = {}
    by_class = {}
    for number, name in enumerate(classes):
        row = {score: _plain(values[number]) for score, values in scores.items()}
        per_class[name] = row["recall"] if num_images[number] else None
        by_class[name] = {"images": num_images[number], **row}
    accuracy = top1(logits, labels)
    return {
        "n": len(labels),
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "top1": accuracy,
        "top1_interval": [float(end) for end in wilson_interval(accuracy, len(labels))],
        "top1_tta": None if logits_tta is None else top1(logits_tta, labels),
        "per_class": per_class,
        "by_class": by_class,
        "macro": {score: _plain(values.nanmean()) for score, values in scores.items()},
        "ece": _ece(logits, labels),
        "temperature": temperature,
        "ece_calibrated": ece_calibrated,
    }


def _ece(logits: Tensor, labels: Tensor) -> float:
    return expected_calibration_error(calibration_bins(logits, labels))


def _plain(value: Tensor) -> float | None:
    """A number for JSON, which knows no NaN."""
    return None if value.isnan() else value.item()


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.numel() == 0:
        shapes = f"logits {tuple(logits.shape)} with labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes}: they must be (N, C) and (N,) with N of at least 1")
    if unusable := int((~logits.isfinite()).sum()):
        raise UnusableInput(
            f"{unusable} of the network's outputs are NaN or infinite: the training has diverged; "
            "train again with a lower --lr"
        )
