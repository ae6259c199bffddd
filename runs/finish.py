"""The end of a run: the test set is read, and what was learned is written down."""

import torch
from torch import nn

import metrics
from config import commandline
from data import Splits
from display import tables
from display.live import best_effort
from reports import evaluation, picture_list, provenance
from runs.training import Training
from runtime import launch
from sources.known_pictures import known
from storage import checkpoint
from storage.files import sha256, write_json
from storage.history import TIMINGS


def finish(training: Training, model: nn.Module, splits: Splits, tta: str) -> None:
    """Reads the test set once; leaves checkpoint, numbers and pictures, and says where they are.

    The pictures come last: one that fails costs a warning and not the run.

    Args:
        training: through; its state is removed at the end.
        model: the whole network.
        splits: with which statistics.
        tta: views of the second accuracy, see `engine.views`.
    """
    run = training.run
    last_row = training.rows[-1]
    described = training.described | {"train_seconds": last_row["seconds"]}
    side = described["image_size"]
    temperature = None
    if splits.val:
        logits, _ = evaluation.predict_split(model, splits.val, splits.stats, side)
        temperature = metrics.fit_temperature(logits, splits.val.labels.cpu())
    report, logits, _ = evaluation.evaluate(model, splits, side, temperature, tta)
    if launch.RANK > 0:
        return

    numbers = {key: value for key, value in last_row.items() if key not in TIMINGS}
    numbers["temperature"] = temperature
    numbers["test_top1"] = report["top1"]
    numbers["test_top1_tta"] = report["top1_tta"]
    content = {key: described[key] for key in provenance.REPEATED}
    content["classes"] = list(splits.classes)
    content["mean"] = list(splits.stats.mean)
    content["std"] = list(splits.stats.std)
    content["metrics"] = numbers
    content["state_dict"] = _on_cpu(model)
    if training.pictures:
        content["pictures"] = known(training.pictures)
        if "test" in training.pictures:  # not CIFAR-10's
            picture_list.write(run.results_dir / "pictures.csv", training.pictures)
    checkpoint.save(run.checkpoint_path, content)
    write_json(run.results_dir / "config.json", described)
    report["name"] = run.name
    report["checkpoint_sha256"] = sha256(run.checkpoint_path)
    write_json(run.results_dir / "test.json", report)
    checkpoint.remove_state(run.state_path)

    accuracy = f"test accuracy {100 * report['top1']:.2f} %"
    if report["top1_tta"] is not None:
        accuracy += f" ({100 * report['top1_tta']:.2f} % averaged over views, {tta})"
    accuracy += f", macro F1 {100 * report['macro']['f1']:.2f} %"
    low, high = report["top1_interval"]
    print(
        f"{accuracy}\n({report['n']:,} images, read once; 95 % interval of the first figure "
        f"{100 * low:.1f} to {100 * high:.1f} %)",
        flush=True,
    )
    print(evaluation.class_lines(report), flush=True)
    best_effort(
        evaluation.draw,
        run.results_dir,
        described,
        model,
        splits,
        logits,
        temperature,
        training.rows,
    )
    best_effort(tables.write, run.results_dir.parent)
    training.live.write("finished", report=report, train_seconds=described["train_seconds"])
    classify = [str(run.checkpoint_path), "--predict", "photo.jpg"]
    print(
        f"weights  {run.checkpoint_path}\nresults  {run.results_dir / 'index.html'}\n"
        f"next     {commandline.quoted(commandline.command_words('evaluate.py', classify))}"
    )


def _on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in model.state_dict().items()}
