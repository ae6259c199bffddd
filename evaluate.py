"""Judges saved checkpoints on the test set, compares them, and classifies your own pictures."""

import argparse
import os
import sys
from pathlib import Path

from config import commandline
from errors import UnusableInput, printable

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
    finished = (p for p in args.checkpoint_dir.glob("*.pt") if not p.name.endswith(".resume.pt"))
    args.checkpoints = args.checkpoints or sorted(finished)
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


def evaluate(args: argparse.Namespace) -> None:
    """Does what the command line says and prints it; what fails does not keep others from it."""
    from reports import tables
    from reports.judging import judge_checkpoint
    from reports.predictions import classify
    from runtime import processes
    from runtime.device import select_device
    from storage import checkpoint

    problems = []
    with processes.joined(select_device(args.device)) as device:
        for path in processes.from_first(args.checkpoints):
            try:
                with processes.agreed():
                    model, saved = checkpoint.load_checkpoint(path, device)
                if args.predict:
                    if len(args.checkpoints) > 1:
                        print(f"{printable(path)}:")
                    classify(model, saved, args.predict, args.tta or "flip", args.figure)
                else:
                    judge_checkpoint(
                        *(path, model, saved, device),
                        results_dir=args.results_dir,
                        data_dir=args.data_dir,
                        pictures=args.pictures,
                        predictions=args.predictions,
                        tta=args.tta or "none",
                        batch_size=args.batch_size,
                    )
            except UnusableInput as error:
                problems.append(str(error))
    if not (args.predict or processes.RANK) and len(problems) < len(args.checkpoints):
        rows = tables.write(args.results_dir)
        if len(args.checkpoints) > 1:
            print(tables.terminal_table(rows))
        print(f"all runs  {args.results_dir / 'index.html'}")
    if problems:
        raise UnusableInput("; ".join(problems))


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return commandline.exit_code(lambda: evaluate(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
