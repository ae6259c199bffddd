"""What finished runs leave behind: checkpoint, test.json, pictures, tables that compare runs."""

import csv
import io
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import metrics
from config import commandline
from data import ChannelStats, Split, Splits, TrainBatches
from engine import predict
from errors import printable
from models import Whitening
from reports import picture_list, tables
from reports.history import TIMINGS
from reports.live import best_effort
from reports.provenance import REPEATED, hardware
from runs.run import Run
from runs.training import Training
from runtime import processes
from sources.known_pictures import known
from storage import checkpoint
from storage.files import sha256, write_atomically, write_json

Row = dict[str, Any]
# Test accuracy on CIFAR-10 of the student project that this repository replaces.
ORIGINAL = {
    **{"custom_cnn": 0.8726, "vgg19": 0.796, "resnet18": 0.8107, "resnet50": 0.8055},
    "mobilenet_v3_small": 0.3985,
}


def finish(training: Training, model: nn.Module, splits: Splits, tta: str) -> None:
    """Reads the test set once; leaves checkpoint, numbers and pictures, and says where they are.

    The pictures come last: one that fails costs a warning and not the run.

    Args:
        training: through; its state is removed at the end.
        model: the whole network.
        splits: with which statistics.
        tta: test-time augmentation of the second accuracy, see `engine.views`.
    """
    run, history = training.run, training.rows
    described = training.described | {"train_seconds": history[-1]["seconds"]}
    side, temperature = described["image_size"], None
    if splits.val:
        logits, _ = predict_split(model, splits.val, splits.stats, side)
        temperature = metrics.fit_temperature(logits, splits.val.labels.cpu())
    report, logits = judge(model, splits, side, temperature, tta)
    if processes.RANK:
        return
    last = {k: v for k, v in history[-1].items() if k not in TIMINGS}
    used = {}
    if training.pictures:
        used["pictures"] = known(training.pictures)
        picture_list.write(run.results_dir / "pictures.csv", training.pictures)
    checkpoint.save(
        run.checkpoint_path,
        {
            **{key: described[key] for key in REPEATED},
            **used,
            "classes": list(splits.classes),
            "mean": list(splits.stats.mean),
            "std": list(splits.stats.std),
            "metrics": {
                **last,
                "temperature": temperature,
                "test_top1": report["top1"],
                "test_top1_tta": report["top1_tta"],
            },
            "state_dict": {key: value.cpu() for key, value in model.state_dict().items()},
        },
    )
    write_json(run.results_dir / "config.json", described)
    report |= {"name": run.name, "checkpoint_sha256": sha256(run.checkpoint_path)}
    write_json(run.results_dir / "test.json", report)
    checkpoint.remove_state(run.state_path)
    print(
        f"test accuracy {100 * report['top1']:.2f} %, averaged over views ({tta}) "
        f"{100 * report['top1_tta']:.2f} %\n({report['n']:,} images, read once)\n"
        f"{class_lines(report)}",
        flush=True,
    )
    best_effort(draw, run.results_dir, described, model, splits, logits, temperature, history)
    best_effort(tables.write, run.results_dir.parent)
    training.live.write("finished", report=report, train_seconds=described["train_seconds"])
    pictures = [str(run.checkpoint_path), "--predict", "photo.jpg"]
    print(
        f"weights  {run.checkpoint_path}\nresults  {run.results_dir / 'index.html'}\n"
        f"next     {commandline.quoted(commandline.typed('evaluate.py', pictures))}"
    )


def predict_split(
    model: nn.Module,
    split: Split,
    stats: ChannelStats,
    side: int,
    tta: str = "none",
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`engine.predict` for the images of a split, in fp32."""
    batch_size = batch_size or (1000 if split.images.is_cuda else 250)
    images = processes.own(split.images)
    return predict(model, data.inputs(images, stats, side, batch_size), tta=tta)


def judge(
    model: nn.Module,
    splits: Splits,
    side: int,
    temperature: float | None,
    tta: str,
    batch_size: int | None = None,
) -> tuple[Row, Tensor]:
    """Judges a network on the test split; training and evaluate.py both do it here.

    Args:
        model: trained.
        splits: its test split is read, normalised by its statistics.
        side: of the network's input, pixels.
        temperature: fitted on the validation split; None where there was none.
        tta: see `engine.views`.
        batch_size: images of 32x32 pixels at a time.

    Returns:
        What test.json says but for the run's name: `metrics.summarize`, `tta`, the hardware,
        seconds and date; and the logits (N, C) without augmentation.
    """
    begin = time.perf_counter()
    logits, averaged = predict_split(model, splits.test, splits.stats, side, tta, batch_size)
    summary = metrics.summarize(
        logits,
        splits.test.labels.cpu(),
        temperature,
        None if tta == "none" else averaged,
        classes=splits.classes,
    )
    more = {
        "tta": tta,
        "device": hardware(splits.test.images.device),
        "seconds": round(time.perf_counter() - begin, 1),
        "date": date.today().isoformat(),
    }
    return summary | more, logits


def draw_batch(run: Run, batches: TrainBatches, splits: Splits) -> None:
    """Draws batch.png, what the network sees: the first training images as augmentation left them.

    Args:
        run: in whose results it goes.
        batches: which it is to train on.
        splits: with the statistics to take the normalisation back by.
    """
    if processes.RANK:
        return

    def picture(path: Path) -> None:
        from reports import figures  # half a second

        x, labels = next(batches.epoch(0))
        mean, std = (torch.tensor(values)[:, None, None] for values in splits.stats)
        images = (x[:32].cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
        title = f"{run.name}: what the network sees"
        figures.batch(images, labels.cpu(), splits.classes, path, title)

    best_effort(picture, run.results_dir / "batch.png")


def draw(
    run_dir: Path,
    described: Row,
    model: nn.Module,
    splits: Splits,
    logits: Tensor,
    temperature: float | None,
    history: Sequence[Row],
) -> None:
    """Draws the pictures of a judged network: its mistakes, its first layer, its curves."""
    from reports import figures  # half a second

    name, side = described["name"], described.get("image_size", 32)
    reference = None if described["config"].get("pictures") else ORIGINAL[described["arch"]]
    labels, images, classes = splits.test.labels.cpu(), splits.test.images.cpu(), splits.classes
    matrix = metrics.confusion_matrix(logits, labels)
    probabilities = (logits.double() / (temperature or 1.0)).softmax(1)

    def picture(kind: str, function: Callable[..., None], *arguments: Any) -> None:
        path = run_dir / f"{kind}.png"
        best_effort(lambda path: function(*arguments, path, name), path)

    picture("confusion_matrix", figures.confusion_matrix, matrix, classes)
    picture("mistakes", figures.mistakes, images, labels, probabilities, classes)
    picture("calibration", figures.calibration, logits, labels, temperature)

    def layer(path: Path) -> None:
        filters, example = first_layer(model, splits, side)
        figures.first_layer(filters, path, name, example)

    best_effort(layer, run_dir / "first_layer.png")
    if history:
        path = run_dir / "curves.png"
        best_effort(lambda path: figures.curves(history, path, name, reference), path)


@torch.inference_mode()
def first_layer(
    model: nn.Module, splits: Splits, side: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The first filters, and what the first convolution makes of a test picture.

    Returns:
        Filters (K, 3, h, w); the picture (H, W, 3) uint8 with its responses (L, h, w).
    """
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    whitening = (module.filters for module in model.modules() if isinstance(module, Whitening))
    responses: list[Tensor] = []
    hook = convolution.register_forward_hook(lambda *_: responses.append(_[2]))
    image = splits.test.images[:1]
    model.eval()(next(data.inputs(image, splits.stats, side)))
    hook.remove()
    filters = next(whitening, convolution.weight.detach())
    return filters.cpu(), (image[0].cpu(), responses[0][0].float().cpu())


def class_lines(report: Row, width: int = 79) -> str:
    """Accuracy of each class in per cent, as many to a line as fit; of many classes the worst."""
    known = {k: v for k, v in report["per_class"].items() if v is not None}
    worst = sorted(known, key=known.get)[:10]
    chosen = [name for name in known if len(known) <= 10 or name in worst]
    text = ", ".join(f"{printable(name)} {100 * known[name]:.1f}" for name in chosen)
    title = "by class (%): " if len(known) <= 10 else "worst classes (%): "
    return textwrap.fill(title + text, width, subsequent_indent="  ")


def summary(report: Row) -> str:
    """The figures of a test report as text for the terminal."""
    lines = [f"top-1 accuracy    {100 * report['top1']:.2f} % of {report['n']:,} test images"]
    if report["top1_tta"] is not None:
        lines.append(f"  with TTA        {100 * report['top1_tta']:.2f} % ({report['tta']})")
    lines.append(f"cross-entropy     {report['loss']:.4f} nats")
    lines.append(f"calibration error {100 * report['ece']:.2f} %")
    if report["ece_calibrated"] is not None:
        lines.append(
            f"  after scaling   {100 * report['ece_calibrated']:.2f} % "
            f"(temperature {report['temperature']:.3f})"
        )
    return "\n".join([*lines, "", class_table(report)])


def class_table(report: Row) -> str:
    """Accuracy, precision, recall and F1 of each class in per cent, the macro averages last."""
    rows = {"class": ("precision", "recall", "F1")}
    scores = {**report["by_class"], "macro average": report["macro"]}
    for name, values in scores.items():
        cells = (values[key] for key in ("precision", "recall", "f1"))
        rows[printable(name)] = tuple("-" if v is None else f"{100 * v:.2f}" for v in cells)
    width = min(max(map(len, rows)), 40)
    return "\n".join(f"{n:<{width}.{width}}  {p:>9} {r:>7} {f:>7}" for n, (p, r, f) in rows.items())


def write_predictions(
    path: Path, splits: Splits, logits: Tensor, temperature: float | None
) -> None:
    """Writes a row for each test image: index, true and predicted class, probabilities."""
    probabilities = (logits.double() / (temperature or 1.0)).softmax(1)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["index", "true", "predicted", *splits.classes])
    for index, (label, values) in enumerate(
        zip(splits.test.labels.tolist(), probabilities, strict=True)
    ):
        names = splits.classes[label], splits.classes[int(values.argmax())]
        rows.writerow([index, *names, *(f"{value:.6f}" for value in values.tolist())])
    write_atomically(path, text.getvalue())
