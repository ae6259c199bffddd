"""Numbers from logits: pure functions on CPU tensors; fractions in [0, 1], losses in nats.

Throughout, `logits` is (N, C) float and `labels` is (N,) int64 with values in [0, C).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_TEMPERATURE = 20.0  # and its reciprocal; a value at either end says that no temperature fits


class CalibrationBins(NamedTuple):
    """Top-label confidence against accuracy in bins of equal width, each closed on its right.

    Attributes:
        count: (B,) int64 images whose confidence falls into the bin.
        confidence: (B,) float64 mean confidence of those images; 0 in an empty bin.
        accuracy: (B,) float64 share of those images classified correctly; 0 in an empty bin.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    _check(logits, labels)
    return (logits.argmax(1) == labels).double().mean().item()


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels in nats, summed in float64."""
    _check(logits, labels)
    return F.cross_entropy(logits.double(), labels).item()


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts of images, (C, C) int64: rows are true classes, columns predicted ones."""
    _check(logits, labels)
    num_classes = logits.shape[1]
    cells = labels * num_classes + logits.argmax(1)
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of each true class classified correctly (its recall).

    Returns:
        (C,) float64; NaN for a class without images.
    """
    matrix = confusion_matrix(logits, labels).double()
    return matrix.diagonal() / matrix.sum(1)


def calibration_bins(logits: Tensor, labels: Tensor, num_bins: int = 15) -> CalibrationBins:
    """Sorts images into bins ((b-1)/B, b/B] of the probability given to the predicted class.

    These are the equal-width, top-label bins of Guo et al. 2017, "On Calibration of Modern Neural
    Networks" (https://arxiv.org/abs/1706.04599), section 2.
    """
    _check(logits, labels)
    confidence, predicted = logits.double().softmax(1).max(1)
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    count = torch.bincount(bins, minlength=num_bins)
    size = count.clamp(min=1)
    return CalibrationBins(
        count,
        torch.bincount(bins, weights=confidence, minlength=num_bins) / size,
        torch.bincount(bins, weights=(predicted == labels).double(), minlength=num_bins) / size,
    )


def expected_calibration_error(bins: CalibrationBins) -> float:
    """Mean gap between confidence and accuracy over the bins, weighted by their images.

    Equation 3 of Guo et al. 2017. It grows with the number of bins and shrinks with the number of
    images, so only values from equal bins and equal splits compare.
    """
    gap = (bins.confidence - bins.accuracy).abs()
    return ((bins.count * gap).sum() / bins.count.sum()).item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 whose logits / T have the smallest cross-entropy (Guo et al. 2017, section 4.2).

    Fit it on validation logits: on the test set it would flatter the calibration. The loss is
    convex in 1/T, so its slope changes sign once and bisection needs no step size or start.

    Returns:
        A value in [1 / MAX_TEMPERATURE, MAX_TEMPERATURE]; an end of it where the minimum lies
        beyond, as when every image (or none) is classified correctly.
    """
    _check(logits, labels)
    logits = logits.double()
    margins = logits - logits.gather(1, labels[:, None])  # to the label's own logit
    low, high = -math.log(MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(50):  # halvings that exhaust float64
        middle = (low + high) / 2
        probabilities = (logits / math.exp(middle)).softmax(1)
        slope = (probabilities * margins).sum(1).mean()  # of the loss in 1/T
        if slope > 0:  # 1/T is too large
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


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
        logits: (N, C) without augmentation.
        labels: (N,) int64.
        temperature: fitted on the validation split; None where there was none.
        logits_tta: (N, C) with test-time augmentation; enters `top1_tta` alone.
        classes: C names.

    Returns:
        `n`, `loss`, `top1`, `top1_tta`, `per_class` ({class: accuracy}), `ece`, `temperature` and
        `ece_calibrated`; None for what is missing, such as the accuracy of a class without images.

    Raises:
        ValueError: no images, shapes that disagree, or logits that are not finite.
    """
    _check(logits, labels)
    if len(classes) != logits.shape[1]:
        raise ValueError(
            f"{len(classes)} class names for {logits.shape[1]} logits: there must be one name per "
            "logit; take both from the same checkpoint"
        )

    def ece(logits: Tensor) -> float:
        return expected_calibration_error(calibration_bins(logits, labels))

    accuracies = per_class_accuracy(logits, labels).tolist()
    return {
        "n": len(labels),
        "loss": cross_entropy(logits, labels),
        "top1": top1(logits, labels),
        "top1_tta": None if logits_tta is None else top1(logits_tta, labels),
        "per_class": {
            name: None if math.isnan(accuracy) else accuracy
            for name, accuracy in zip(classes, accuracies, strict=True)
        },
        "ece": ece(logits),
        "temperature": temperature,
        "ece_calibrated": None if temperature is None else ece(logits.double() / temperature),
    }


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.numel() == 0:
        raise ValueError(
            f"logits {tuple(logits.shape)} with labels {tuple(labels.shape)}: they must be (N, C) "
            "and (N,) with N of at least 1; predict the split the labels belong to"
        )
    if not logits.isfinite().all():
        raise ValueError(
            f"{int((~logits.isfinite()).sum())} logits are NaN or infinite: metrics need finite "
            "ones; the network has diverged, train it with a lower --lr"
        )
