"""What a fine-tuning costs with the frozen trunk computed once, relative to at every step.

Both sides are `finetune.py` itself, run in turn on some of the images; the time is that of the
training and, where the trunk is computed once, of that; both sides compute in one precision.
"""

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import finetune
from benchmarks import common
from config.recipes import BY_NETWORK

KEYS = ("arch", "unfreeze", "epochs", "limit", "precision")


def seconds(cache: str, args: Namespace) -> float:
    """Trains once; returns the seconds its config.json gives."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [text for key in KEYS for text in (f"--{key}", str(getattr(args, key)))]
        flags += ["--weights", "none", "--val-fraction", "0", "--device", str(args.device), cache]
        flags += ["--data-dir", str(args.data_dir), "--checkpoint-dir", folder]
        if code := finetune.main([*flags, "--results-dir", folder]):
            raise SystemExit(code)
        return json.loads(Path(folder, args.arch, "config.json").read_text())["train_seconds"]


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--arch", choices=BY_NETWORK, default="resnet18")
    parser.add_argument("--unfreeze", choices=("head", "last"), default="last")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, default=2000, help="images")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sides = ("--cache", "--no-cache")
    rounds = [{side: seconds(side, args) for side in sides} for _ in range(args.rounds)]
    ratio = statistics.median(each["--cache"] / each["--no-cache"] for each in rounds)
    print(f"{args.arch} --unfreeze {args.unfreeze}: {ratio:.2f} of the time")
    chosen = {key: getattr(args, key) for key in KEYS}
    common.write(args, chosen | {"ratio": round(ratio, 3), "seconds": rounds})


if __name__ == "__main__":
    main()
