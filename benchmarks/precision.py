"""How often `--precision auto` decides otherwise beside another load.

A training that took the slower number format for a moment's load would end in other weights, and
take twice as long. Here the choice is made again and again for the default network while another
process multiplies matrices on all cores, in bursts.
"""

import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_custom
from benchmarks import common
from runtime.device import choose_precision


def load() -> None:
    """Keeps the cores busy for half a second, rests as long, and begins again."""
    a = torch.randn(1500, 1500)
    while True:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            a @ a
        time.sleep(0.5)


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--recipe", default="modern")
    args = parser.parse_args()
    settings = train_custom.parse(["--recipe", args.recipe])
    splits = common.splits(settings, args)
    model, _, batches = train_custom.begin(settings, splits)
    batch = next(batches.epoch(0))
    busy = multiprocessing.get_context("spawn").Process(target=load, daemon=True)
    busy.start()
    chosen, reasons = dict.fromkeys(("fp32", "bf16"), 0), []
    for _ in range(args.probes):
        precision, reason = choose_precision("auto", model, batch, args.device)
        chosen[precision] += 1
        reasons.append(reason)
    busy.terminate()
    figures = {"recipe": args.recipe, "probes": args.probes, "chosen": chosen}
    figures["seen"] = sorted(set(reasons))[:: max(1, args.probes // 5)]
    print(figures)
    common.write(args, figures)


if __name__ == "__main__":
    main()
