"""How well a network does on its test images, as numbers, text and pictures."""

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
from data import ChannelStats, Split, Splits, TrainBatches
from display import figures, pages
from display.live import best_effort
from engine import predict
from errors import UnusableInput, printable
from models import Whitening
from reports import predictions, provenance
from reports.images_to_evaluate import images_to_evaluate
from runtime import launch, processes
from storage import history, outputs
from storage.files import read_json, sha256, write_json

Row = dict[str, Any]
WORST_SHOWN = 10  # classes named on the screen where there are more


def usual_views(flip: str, moved: bool = False) -> str:
    """The views to average over for a network, as `engine.views` names them.

    A network has seen mirror images only if its training mirrored: for one that tells left from
    right a mirror image is another class.

    Args:
        flip: the setting of its training.
        moved: whether moved views are wanted too.
    """
    if flip == "none":
        return "shifts" if moved else "none"
    return "crops" if moved else "flip"


def predict_split(
    model: nn.Module,
    split: Split,
    stats: ChannelStats,
    side: int,
    tta: str = "none",
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`engine.predict` for the images of a split, in fp32.

    Args:
        model: on the split's device.
        split: what it is asked.
        stats: it was trained with.
        side: of its input, pixels.
        tta: see `engine.views`.
        batch_size: images of 32x32 pixels at a time; by default 1000 on a GPU, 250 on a CPU.
    """
    if batch_size is None:
        batch_size = 1000 if split.images.is_cuda else 250
    images = processes.own_part(split.images)
    return predict(model, data.inputs(images, stats, side, batch_size), tta=tta)


def evaluate(
    model: nn.Module,
    splits: Splits,
    side: int,
    temperature: float | None,
    tta: str,
    batch_size: int | None = None,
) -> tuple[Row, Tensor, Tensor]:
    """Evaluates a network on the test split, at the end of a training and in evaluate.py.

    Args:
        model: trained.
        splits: its test split is read, normalised by its statistics.
        side: of the network's input, pixels.
        temperature: fitted on the validation split; None where there was none.
        tta: see `engine.views`.
        batch_size: see `predict_split`.

    Returns:
        What test.json says but for the run's name: `metrics.summarize`, `tta`, the hardware,
        seconds and date; and the logits (N, C) of the images as they are and averaged over views.
    """
    begin = time.perf_counter()
    logits, averaged = predict_split(model, splits.test, splits.stats, side, tta, batch_size)
    report = metrics.summarize(
        logits,
        splits.test.labels.cpu(),
        temperature,
        None if tta == "none" else averaged,
        classes=splits.classes,
    )
    report["tta"] = tta
    report["device"] = provenance.hardware(splits.test.images.device)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    report["date"] = date.today().isoformat()
    return report, logits, averaged


def evaluate_checkpoint(
    path: Path,
    model: nn.Module,
    saved: Row,
    device: torch.device,
    *,
    results_dir: Path,
    data_dir: Path,
    pictures: Path | None,
    predictions_path: Path | None,
    tta: str,
    records_views: bool,
    batch_size: int,
) -> None:
    """Evaluates a checkpoint on its test images; writes its test.json, pictures and page.

    On other images, and of an unfinished run, all that goes beside them: test-NAME.json, and
    pictures and page in a folder test-NAME/. NAME is the images' folder; of another folder of the
    same name it is NAME-2.

    Args:
        path: the checkpoint.
        model: its network, on the device.
        saved: what else it holds.
        device: the model's.
        results_dir: where the run's folder is.
        data_dir: see `images_to_evaluate`.
        pictures: see `images_to_evaluate`.
        predictions_path: a CSV to write, a row for each test image.
        tta: see `engine.views`; the CSV holds the average over these views.
        records_views: whether the report says its accuracy too; otherwise an earlier one stays.
        batch_size: images of 32x32 pixels at a time.

    Raises:
        UnusableInput: the run's folder holds results of another checkpoint, or a person's files.
    """
    run_dir = results_dir / Path(saved["name"]).name  # whatever a foreign file says
    digest = sha256(path)
    unfinished = saved.get("unfinished", "")
    with processes.agreed():
        earlier = processes.from_first(read_json(run_dir / "test.json"))
        if not unfinished and earlier.get("checkpoint_sha256", digest) != digest:
            raise UnusableInput(
                f"{run_dir}/ holds the results of another checkpoint than {printable(path)}: give "
                "--results-dir"
            )
        outputs.check_run_dir(run_dir)
        asked = images_to_evaluate(saved, data_dir, pictures, device, scratch=path)
    splits = asked.splits
    temperature = saved["metrics"].get("temperature")
    side = saved.get("image_size", 32)
    report, logits, averaged = evaluate(model, splits, side, temperature, tta, batch_size)
    if launch.RANK > 0:
        return
    report["name"] = saved["name"]
    report["checkpoint_sha256"] = digest
    if not records_views:
        report["tta"] = "none"
        report["top1_tta"] = None
    notes = [note for note in (unfinished, asked.note) if note]
    if notes:
        report["note"] = "; ".join(notes)
        suffix = []
        if unfinished:
            suffix.append("unfinished")
        if asked.note:
            place = pictures or Path(saved["config"]["pictures"])
            report["folder"] = str(place.resolve())
            suffix.append(place.resolve().name or "pictures")
        report_path = _free_report(run_dir, "-".join(["test", *suffix]), report.get("folder"))
        page_dir = report_path.with_suffix("")
    else:
        page_dir = run_dir
        report_path = run_dir / "test.json"
        if report["top1_tta"] is None and earlier.get("top1_tta") is not None:
            report["tta"] = earlier["tta"]  # of the same weights
            report["top1_tta"] = earlier["top1_tta"]
    if not (run_dir / "config.json").exists():
        described = {key: saved[key] for key in provenance.REPEATED if key in saved}
        write_json(run_dir / "config.json", described)
    write_json(report_path, report)
    if predictions_path:
        labels = splits.test.labels.tolist()
        predictions.write_test(
            predictions_path, labels, averaged, temperature, splits.classes, tta, asked.files
        )
    print(printable(path))
    for note in notes:
        print(note)
    print(f"{summary(report)}\n", flush=True)
    if notes:
        print(f"written to {printable(report_path)} and {printable(page_dir)}/")
    rows = history.read(run_dir / "history.csv")
    draw(page_dir, saved, model, splits, logits, temperature, rows)
    content = saved | {
        "status": "unfinished" if unfinished else "finished",
        "note": report.get("note"),
        "updated": time.time(),
        "history": rows,
        "report": report,
    }
    best_effort(pages.write, page_dir, content)


def draw_batch(path: Path, name: str, batches: TrainBatches, splits: Splits) -> None:
    """Draws what the network sees: the first training images as augmentation left them.

    Args:
        path: the PNG.
        name: of the run.
        batches: which it is to train on.
        splits: with the statistics to take the normalisation back by.
    """
    x, labels = next(batches.epoch(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in splits.stats)
    images = (x[:32].cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    figures.batch(images, labels.cpu(), splits.classes, path, f"{name}: what the network sees")


def _free_report(run_dir: Path, name: str, folder: str | None) -> Path:
    """The path NAME.json, or the first of NAME-2.json, ... that reports on no other folder."""
    path = run_dir / f"{name}.json"
    number = 1
    while path.exists() and read_json(path).get("folder", folder) != folder:
        number += 1
        path = run_dir / f"{name}-{number}.json"
    return path


def draw(
    run_dir: Path,
    described: Row,
    model: nn.Module,
    splits: Splits,
    logits: Tensor,
    temperature: float | None,
    rows: Sequence[Row],
) -> None:
    """Draws the pictures of an evaluated network: its mistakes, its first layer, its curves.

    One that cannot be drawn is a warning and costs the others nothing.

    Args:
        run_dir: where they go.
        described: what config.json says of the run.
        model: trained.
        splits: its test split is shown.
        logits: (N, C) of the test images.
        temperature: fitted on the validation split; None where there was none.
        rows: of history.csv.
    """
    name = described["name"]
    side = described.get("image_size", 32)
    labels = splits.test.labels.cpu()
    images = splits.test.images.cpu()
    matrix = metrics.confusion_matrix(logits, labels)
    probabilities = predictions.probabilities(logits, temperature)

    def picture(kind: str, function: Callable[..., None], *arguments: Any) -> None:
        path = run_dir / f"{kind}.png"
        best_effort(lambda path: function(*arguments, path, name), path)

    def layer(path: Path, name: str) -> None:
        filters, example = first_layer(model, splits, side)
        figures.first_layer(filters, path, name, example)

    def mistakes(path: Path, name: str) -> None:
        calibrated = temperature is not None
        figures.mistakes(images, labels, probabilities, splits.classes, path, name, calibrated)

    def curves(path: Path, name: str) -> None:
        figures.curves(rows, path, name, history.begins_again(described["config"], rows))

    picture("confusion_matrix", figures.confusion_matrix, matrix, splits.classes)
    picture("mistakes", mistakes)
    picture("calibration", figures.calibration, logits, labels, temperature)
    picture("first_layer", layer)
    if rows:
        picture("curves", curves)


@torch.inference_mode()
def first_layer(
    model: nn.Module, splits: Splits, side: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The first filters, and what the first convolution makes of a test picture.

    Returns:
        Filters (K, 3, h, w); the picture (H, W, 3) uint8 with its responses (L, h, w).
    """
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    filters = convolution.weight.detach()
    for module in model.modules():
        if isinstance(module, Whitening):
            filters = module.filters
    responses: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        responses.append(output)

    hook = convolution.register_forward_hook(note)
    image = splits.test.images[:1]
    model.eval()
    model(next(data.inputs(image, splits.stats, side)))
    hook.remove()
    return filters.cpu(), (image[0].cpu(), responses[0][0].float().cpu())


def class_lines(report: Row, width: int = 79) -> str:
    """Accuracy of each class in per cent, as many to a line as fit; of many classes the worst."""
    known = {name: value for name, value in report["per_class"].items() if value is not None}
    shown = known
    title = "by class (%): "
    if len(known) > WORST_SHOWN:
        worst = sorted(known, key=known.get)[:WORST_SHOWN]
        shown = {name: value for name, value in known.items() if name in worst}
        title = "worst classes (%): "
    text = ", ".join(f"{printable(name)} {100 * value:.1f}" for name, value in shown.items())
    return textwrap.fill(title + text, width, subsequent_indent="  ")


def summary(report: Row) -> str:
    """The figures of a test report as text for the terminal."""
    low, high = report["top1_interval"]
    lines = [
        f"top-1 accuracy    {100 * report['top1']:.2f} % of {report['n']:,} test images",
        f"  95 % interval   {100 * low:.2f} to {100 * high:.2f} %",
    ]
    if report["top1_tta"] is not None:
        lines.append(f"  with TTA        {100 * report['top1_tta']:.2f} % ({report['tta']})")
    lines.append(f"macro F1          {_percent(report['macro']['f1'])} %")
    lines.append(f"cross-entropy     {report['loss']:.4f} nats")
    lines.append(f"calibration error {100 * report['ece']:.2f} %")
    if report["ece_calibrated"] is not None:
        lines.append(
            f"  after scaling   {100 * report['ece_calibrated']:.2f} % "
            f"(temperature {report['temperature']:.3f})"
        )
    lines.append("")
    lines.append(class_table(report))
    return "\n".join(lines)


def class_table(report: Row) -> str:
    """Accuracy, precision, recall and F1 of each class in per cent, the macro averages last."""
    rows = [(printable(name), values) for name, values in report["by_class"].items()]
    rows.append(("macro average", report["macro"]))
    width = min(max(len(text) for text, _ in rows), 40)
    lines = [f"{'class':<{width}}  {'precision':>9} {'recall':>7} {'F1':>7}"]
    for text, values in rows:
        precision, recall, f1 = (_percent(values[key]) for key in ("precision", "recall", "f1"))
        lines.append(f"{text:<{width}.{width}}  {precision:>9} {recall:>7} {f1:>7}")
    return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f}"
