"""Evaluates saved checkpoints on the test set, compares them, and classifies your own pictures."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from config import commandline
from errors import UnusableInput, printable
from runtime import launch
from storage import outputs

EXAMPLES = """\
examples:
  python evaluate.py checkpoints/custom_cnn.pt --tta crops
  python evaluate.py checkpoints/custom_cnn.pt --predict photo.jpg folder/
  python evaluate.py checkpoints/custom_cnn.pt --export custom_cnn.onnx
  python evaluate.py         all finished checkpoints, and a table of all runs

Numbers and pictures go to results/NAME/. A file that a flag names is replaced
only where the same flag has written it."""
UNFINISHED = ".resume.pt"  # how the names of states end
ENDINGS = (".onnx", ".pt2")  # of what --export writes
ONNX_PACKAGES = ("onnx", "onnxscript")  # which torch writes ONNX with


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Turns the command line into settings.

    Raises:
        UnusableInput: a flag is unknown or its value breaks a rule.
    """
    parser = commandline.Parser("evaluate.py", __doc__, EXAMPLES)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="default: all finished")
    add(
        "--tta",
        choices=("none", "flip", "shifts", "crops"),
        help="views to average over: mirrored, moved, or both (default: none; for --predict and "
        "--predictions flip, if the training mirrored)",
    )
    add("--predict", nargs="+", type=Path, metavar="PATH", help="classify pictures and folders")
    add(
        "--figure",
        type=Path,
        metavar="FILE.png",
        help="with --predict: draw what it saw, and where it found the likeliest class",
    )
    add(
        "--predictions",
        type=Path,
        metavar="FILE.csv",
        help="write a row for each test image, or each picture of --predict",
    )
    add(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="where the pictures it was trained on are now; or other ones, in a folder per class, "
        "to evaluate it on",
    )
    add(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the network for other programs: .onnx, or .pt2 for torch.export.load",
    )
    add(
        "--device",
        default="auto",
        help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps (default: auto)",
    )
    add(
        "--batch-size",
        type=int,
        default=250,
        help="images of 32x32 pixels at a time (default: 250)",
    )
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="where CIFAR-10 is kept (default: data)",
    )
    add(
        "--checkpoint-dir",
        type=Path,
        default=Path("checkpoints"),
        help="where weights are (default: checkpoints)",
    )
    add(
        "--results-dir",
        type=Path,
        default=Path("results"),
        help="where numbers and pictures go (default: results)",
    )
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Refuses what does not go together; takes all finished checkpoints where none is named."""
    if args.batch_size < 1:
        raise UnusableInput(f"--batch-size {args.batch_size}: must be at least 1")
    if args.predict and launch.WORLD_SIZE > 1:
        raise UnusableInput(
            "--predict under torchrun: pictures are read by one process; run it alone"
        )
    if not args.checkpoints:
        args.checkpoints = sorted(
            path for path in args.checkpoint_dir.glob("*.pt") if not path.name.endswith(UNFINISHED)
        )
    if not args.checkpoints:
        raise UnusableInput(
            f"no finished checkpoint in {printable(args.checkpoint_dir)}/: run "
            "`python train_custom.py` first, or name one"
        )
    if args.figure and not args.predict:
        raise UnusableInput("--figure draws what --predict saw: give --predict PATH too")
    if args.figure:
        outputs.check("--figure", args.figure, (".png",))
    if args.predictions:
        outputs.check("--predictions", args.predictions, (".csv",))
    if args.export:
        _check_export(args)
    if args.predict and args.pictures:
        raise UnusableInput("--pictures is a folder to evaluate on, --predict asks: give one")
    for option in ("predictions", "figure", "export"):
        if getattr(args, option) and len(args.checkpoints) > 1:
            raise UnusableInput(
                f"--{option} takes one checkpoint, not {len(args.checkpoints)}: name it"
            )


def _check_export(args: argparse.Namespace) -> None:
    """Refuses what cannot be written, and what would be done beside it."""
    name = printable(args.export)
    if args.export.suffix not in ENDINGS:
        raise UnusableInput(
            f"--export {name}: the ending must be {' or '.join(ENDINGS)}; .onnx is for other "
            "programs, .pt2 for torch.export.load"
        )
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if args.export.suffix == ".onnx" and missing:
        raise UnusableInput(
            f"--export {name}: torch needs {' and '.join(ONNX_PACKAGES)} for it; "
            f"`pip install {' '.join(missing)}`, or give an ending .pt2"
        )
    for option in ("predict", "predictions", "pictures", "tta"):
        if getattr(args, option):
            raise UnusableInput(f"--export writes the network alone: leave --{option} out")
    outputs.check("--export", args.export, ENDINGS)
    if launch.WORLD_SIZE > 1:
        raise UnusableInput("--export under torchrun: one process writes the file; run it alone")


if __name__ == "__main__":
    commandline.before_torch(parse)  # importing torch takes seconds: --help need not wait

import torch

from display import tables
from reports import evaluation, export, predictions
from runtime import processes
from runtime.device import select_device
from storage import checkpoint
from storage.files import tell


def evaluate(args: argparse.Namespace) -> None:
    """Does what the command line says and prints it; what fails does not keep others from it."""
    problems = []
    with processes.joined(select_device(args.device)) as device:
        for path in processes.from_first(args.checkpoints):
            try:
                if args.export:
                    _export(path, args.export)
                elif args.predict:
                    _classify(path, args, device)
                else:
                    _evaluate(path, args, device)
            except UnusableInput as error:
                problems.append(str(error))
    some_evaluated = len(problems) < len(args.checkpoints)
    asked_only = args.predict or args.export
    if some_evaluated and not asked_only and launch.RANK == 0:
        rows = tables.write(args.results_dir)
        if len(args.checkpoints) > 1:
            print(tables.terminal_table(rows))
        print(f"all runs  {args.results_dir / 'index.html'}")
    if problems:
        raise UnusableInput("; ".join(problems))


def _load(path: Path, device: torch.device) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network of a finished checkpoint, or of a state of an unfinished run."""
    if path.name.endswith(UNFINISHED):
        return checkpoint.load_unfinished(path, device)
    return checkpoint.load_checkpoint(path, device)


def _export(path: Path, wanted: Path) -> None:
    network, saved = _load(path, torch.device("cpu"))
    export.write(wanted, network, saved)
    about = export.metadata(saved)
    print(
        f"{printable(path)}: written to {printable(wanted)}\n"
        f"squares (N, H, W, 3) uint8 in, probabilities (N, {len(saved['classes'])}) out, "
        f"{about['calibration']}"
    )


def _classify(path: Path, args: argparse.Namespace, device: torch.device) -> None:
    model, saved = _load(path, device)
    if len(args.checkpoints) > 1:
        print(f"{printable(path)}:")
    views = args.tta or _usual_views(saved)
    _warn_of_mirror_images(views, saved)
    predictions.classify(
        model,
        saved,
        args.predict,
        views,
        figure=args.figure,
        table_path=args.predictions,
        batch_size=args.batch_size,
    )


def _usual_views(saved: dict[str, Any]) -> str:
    return evaluation.usual_views(saved["config"].get("flip", "random"))


def _warn_of_mirror_images(views: str, saved: dict[str, Any]) -> None:
    if views in ("flip", "crops") and saved["config"].get("flip") == "none":
        tell(
            f"warning: --tta {views} averages over mirror images too, and none trained this "
            "network (--flip none)"
        )


def _evaluate(path: Path, args: argparse.Namespace, device: torch.device) -> None:
    with processes.agreed():
        model, saved = _load(path, device)
    views = args.tta or "none"
    if args.predictions and not args.tta:
        views = _usual_views(saved)
    _warn_of_mirror_images(views, saved)
    evaluation.evaluate_checkpoint(
        path,
        model,
        saved,
        device,
        results_dir=args.results_dir,
        data_dir=args.data_dir,
        pictures=args.pictures,
        predictions_path=args.predictions,
        tta=views,
        records_views=args.tta is not None,
        batch_size=args.batch_size,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return commandline.exit_code(lambda: evaluate(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
