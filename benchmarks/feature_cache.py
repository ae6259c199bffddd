"""What a fine-tuning costs with the frozen trunk computed once, relative to at every step.

Both sides are `finetune.py` itself, run in turn on some of the images; the time is that of the
training and, where the trunk is computed once, of that; both sides compute in one precision.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import finetune
from files import write_json
from models import ARCHS
from records import measured


def seconds(arch: str, cache: str, args: argparse.Namespace) -> float:
    """Trains once; returns the seconds its config.json gives."""
    with tempfile.TemporaryDirectory() as folder:
        code = finetune.main(
            [
                *("--arch", arch, "--weights", "none", "--unfreeze", args.unfreeze, cache),
                *("--epochs", str(args.epochs), "--limit", str(args.limit), "--val-fraction", "0"),
                *("--precision", args.precision, "--device", "cpu"),
                *("--data-dir", str(args.data_dir), "--checkpoint-dir", folder),
                *("--results-dir", folder),
            ]
        )
        if code:
            raise SystemExit(code)
        return json.loads((Path(folder) / arch / "config.json").read_text())["train_seconds"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=ARCHS, default="resnet18")
    parser.add_argument("--unfreeze", choices=("head", "last"), default="last")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, default=2000, help="images")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    rounds = [
        {cache: seconds(args.arch, cache, args) for cache in ("--cache", "--no-cache")}
        for _ in range(args.rounds)
    ]
    ratio = statistics.median(each["--cache"] / each["--no-cache"] for each in rounds)
    print(
        f"{args.epochs} epochs of {args.arch} --unfreeze {args.unfreeze}: {ratio:.2f} of the time"
    )
    if args.output:
        keys = ("arch", "unfreeze", "epochs", "limit", "precision")
        settings = {key: vars(args)[key] for key in keys}
        found = {"ratio": round(ratio, 3), "seconds": rounds}
        write_json(args.output, measured(settings | found))


if __name__ == "__main__":
    main()
