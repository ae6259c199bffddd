"""Judges saved checkpoints on the test set, compares them, and classifies your own pictures."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UnusableInput, printable
from runs import commandline

if TYPE_CHECKING:
    import torch
    from torch import nn

    from data import Splits

MOST_DRAWN = 50  # pictures in one figure

EXAMPLES = """\
examples:
  python evaluate.py checkpoints/custom_cnn.pt --tta crops
  python evaluate.py checkpoints/custom_cnn.pt --predict photo.jpg folder/
  python evaluate.py         all finished checkpoints, and a table of all runs

Numbers and pictures go to results/NAME/."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Turns the command line into settings.

    Raises:
        UnusableInput: a flag is unknown or its value breaks a rule.
    """
    parser = commandline.Parser("evaluate.py", __doc__, EXAMPLES)
    add, views = parser.add_argument, ("none", "flip", "crops")
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="default: all finished")
    add("--tta", choices=views, help="views to average over (default: none; pictures: flip)")
    add("--predict", nargs="+", type=Path, metavar="PATH", help="classify pictures and folders")
    add("--figure", type=Path, metavar="FILE.png", help="with --predict: draw what it saw")
    add("--predictions", type=Path, metavar="FILE.csv", help="write a row for each test image")
    add("--pictures", type=Path, metavar="DIR", help="where the pictures it was trained on are now")
    for name, default, meaning in (
        ("--device", "auto", "auto (a GPU where there is one), cpu, cuda, cuda:1, mps"),
        ("--batch-size", 250, "images of 32x32 pixels at a time"),
        ("--data-dir", Path("data"), "where CIFAR-10 is kept"),
        ("--checkpoint-dir", Path("checkpoints"), "where weights are"),
        ("--results-dir", Path("results"), "where numbers and pictures go"),
    ):
        kind, text = type(default), f"{meaning} (default: {default})"
        add(name, type=Path if isinstance(default, Path) else kind, default=default, help=text)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UnusableInput(f"--batch-size {args.batch_size}: must be at least 1")
    if args.predict and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UnusableInput(
            "--predict under torchrun: pictures are read by one process; run it alone"
        )
    args.checkpoints = args.checkpoints or finished(args.checkpoint_dir)
    if not args.checkpoints:
        raise UnusableInput(
            f"no finished checkpoint in {printable(args.checkpoint_dir)}/: run "
            "`python train_custom.py` first, or name one"
        )
    if args.figure and not args.predict:
        raise UnusableInput("--figure draws what --predict saw: give --predict PATH too")
    if args.predictions and args.predict:
        raise UnusableInput("--predictions is of the test images, not of --predict's: give one")
    for option in ("predictions", "figure"):
        if getattr(args, option) and len(args.checkpoints) > 1:
            raise UnusableInput(
                f"--{option} takes one checkpoint, not {len(args.checkpoints)}: name it"
            )
    return args


def finished(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, by name."""
    return sorted(p for p in folder.glob("*.pt") if not p.name.endswith(".resume.pt"))


def evaluate(args: argparse.Namespace) -> None:
    """Does what the command line says and prints it; what fails does not keep others from it."""
    import processes
    from device import select_device
    from runs import tables
    from storage import checkpoint

    problems = []
    with processes.joined(select_device(args.device)) as device:
        for path in processes.from_first(args.checkpoints):
            try:
                with processes.agreed():
                    model, saved = checkpoint.load_model(path, device)
                if args.predict:
                    if len(args.checkpoints) > 1:
                        print(f"{printable(path)}:")
                    classify(model, saved, args, device)
                else:
                    judge(path, model, saved, args, device)
            except UnusableInput as error:
                problems.append(str(error))
    if not (args.predict or processes.RANK) and len(problems) < len(args.checkpoints):
        rows = tables.write(args.results_dir)
        if len(args.checkpoints) > 1:
            print(tables.terminal_table(rows))
        print(f"all runs  {args.results_dir / 'index.html'}")
    if problems:
        raise UnusableInput("; ".join(problems))


def test_split(saved: dict[str, Any], args: argparse.Namespace, device: "torch.device") -> "Splits":
    """The test images a checkpoint is to be judged on, with its classes and statistics."""
    import torch

    from data import ChannelStats, Split, Splits
    from sources.cifar10 import cifar10

    if folder := saved["config"].get("pictures"):
        from sources import pictures

        shares = {key: saved["config"][key] for key in ("val_fraction", "seed")}
        place, side = args.pictures or Path(folder), saved["data"]["image_shape"][0]
        arrays, source = pictures.folder(place, side, **shares)
        drawn = [{k: of.get(k) for k in ("per_class", "splits")} for of in (source, saved["data"])]
        if drawn[0] != drawn[1]:  # what is drawn anew could hold images it was trained on
            raise UnusableInput(
                f"{printable(place)} has changed since {saved['name']} was trained on it: restore "
                "it, or name with --pictures where it lies as it was"
            )
    else:
        arrays = cifar10(args.data_dir)
    if list(arrays.classes) != saved["classes"]:
        raise UnusableInput(
            f"{saved['name']} knows other classes than {printable(folder or 'CIFAR-10')}: name the "
            "pictures it was trained on with --pictures"
        )
    limit = saved["config"].get("limit")  # a smoke run is judged on what it was meant for
    images = torch.from_numpy(arrays.test_images[:limit]).to(device)
    labels = torch.from_numpy(arrays.test_labels[:limit].astype("int64")).to(device)
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    return Splits(arrays.classes, stats, None, None, Split(images, labels))


def judge(
    path: Path,
    model: "nn.Module",
    saved: dict[str, Any],
    args: argparse.Namespace,
    device: "torch.device",
) -> None:
    """Evaluates a checkpoint on the test set; writes its test.json, pictures and page.

    Raises:
        UnusableInput: the run's folder holds the results of another checkpoint.
    """
    import processes
    from runs import history, page, records, reports
    from runs.live import best_effort
    from storage.files import read_json, sha256, write_json

    run_dir, digest = args.results_dir / saved["name"], sha256(path)
    with processes.agreed():
        earlier = processes.from_first(read_json(run_dir / "test.json"))
        if earlier.get("checkpoint_sha256", digest) != digest:
            raise UnusableInput(
                f"{run_dir}/ holds the results of another checkpoint than {printable(path)}: give "
                "--results-dir"
            )
        splits = test_split(saved, args, device)
    temperature = saved["metrics"].get("temperature")
    side = saved.get("image_size", 32)
    report, logits = reports.judge(
        model, splits, side, temperature, args.tta or "none", args.batch_size
    )
    if processes.RANK:
        return
    report |= {"name": saved["name"], "checkpoint_sha256": digest}
    if report["top1_tta"] is None:
        report |= {key: earlier[key] for key in ("tta", "top1_tta") if key in earlier}
    if not (run_dir / "config.json").exists():
        write_json(run_dir / "config.json", {k: saved[k] for k in records.REPEATED if k in saved})
    write_json(run_dir / "test.json", report)
    if args.predictions:
        reports.write_predictions(args.predictions, splits, logits, temperature)
    print(f"{printable(path)}\n{reports.summary(report)}\n", flush=True)
    rows = history.read(run_dir / "history.csv")
    reports.draw(run_dir, saved, model, splits, logits, temperature, rows)
    content = {**saved, "status": "finished", "updated": time.time()}
    content |= {"history": rows, "report": report}
    best_effort(lambda path: page.write(path, content), run_dir)


def classify(
    model: "nn.Module", saved: dict[str, Any], args: argparse.Namespace, device: "torch.device"
) -> None:
    """Prints the three likeliest classes of each picture, and draws them where asked.

    Raises:
        UnusableInput: some pictures could not be read; the others have been printed.
    """
    import torch

    from data import ChannelStats, Split
    from runs import reports
    from sources import pictures

    files = list(pictures.find(args.predict))
    if not files:
        given = " ".join(map(printable, args.predict))
        raise UnusableInput(f"--predict {given}: no pictures there; give files or their folder")
    names = [printable(file.name) for file in files]
    if len(set(names)) < len(names):
        names = [printable(file) for file in files]
    width, unreadable, shown = min(max(map(len, names)), 40), 0, []
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    side = saved.get("image_size", 32)
    seen_side = saved.get("data", {}).get("image_shape", [32])[0]
    for name, file in zip(names, files, strict=True):
        notes: list[str] = []
        try:
            seen = pictures.load(file, seen_side, notes)
        except UnusableInput as error:
            print(f"error: {error}", file=sys.stderr)
            unreadable += 1
            continue
        split = Split(torch.from_numpy(seen)[None].to(device), torch.zeros(1, dtype=torch.int64))
        _, logits = reports.predict_split(model, split, stats, side, args.tta or "flip")
        scaled = logits[0] / (saved["metrics"].get("temperature") or 1.0)
        top = scaled.softmax(0).topk(min(3, len(saved["classes"])))
        likely = [
            (printable(saved["classes"][index]), value)
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        guesses = ", ".join(f"{label} {100 * value:.1f} %" for label, value in likely)
        print(f"{name:<{width}}  {guesses}", *(f"({note})" for note in notes), flush=True)
        if args.figure and len(shown) < MOST_DRAWN:
            shown.append((name, pictures.load(file, 224), seen, likely))
    if args.figure and shown:
        import figures

        figures.predictions(shown, args.figure, saved["name"])
        print(f"drawn in {printable(args.figure)}: {len(shown)} of {len(files)}")
    if unreadable:
        raise UnusableInput(
            f"{unreadable} of {len(files)} pictures could not be read, named above: leave them out"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return commandline.exit_code(lambda: evaluate(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
