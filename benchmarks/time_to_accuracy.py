"""Minutes and operations to 87.26, 90, 93, 94, 95 and 96 % test accuracy.

A schedule that ends earlier is a training of its own: an accuracy counts as reached by a training
that was planned for its number of epochs, from its start to its last step, not by a moment of a
longer one. So every row is a complete run; the answer for an accuracy is the shortest whose mean
over its seeds reaches it. Rows that `--output` holds are kept and not run again. The plain loop is
that of `throughput.py`, on the classic network.
"""

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import metrics
import train_custom
from benchmarks import common
from config import recipes
from models import create_model
from reports import evaluation
from runtime.device import now
from storage.files import write_atomically

TARGETS = (0.8726, 0.90, 0.93, 0.94, 0.95, 0.96)  # the first is what the original project ended at
RUNS = (
    *("speedrun:6", "speedrun:8", "speedrun:10", "modern:10", "modern:20", "best:24", "best:100"),
    *("classic:10", "classic:30", "plain:10"),
)
VIEWS = {"top1": "Top-1 (%)", "top1_tta": "With TTA (%)"}


def ours(recipe: str, epochs: int, seed: int, args: Namespace) -> dict[str, float]:
    """A complete run of `train_custom.py`."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *("--recipe", recipe, "--epochs", str(epochs), "--seed", str(seed)),
            *("--data-dir", str(args.data_dir), "--device", str(args.device)),
            *("--checkpoint-dir", folder, "--results-dir", folder),
            *(["--limit", str(args.limit)] if args.limit else []),
        ]
        if code := train_custom.main(flags):
            raise SystemExit(code)
        results = Path(folder) / "custom_cnn"
        test, config = (json.loads((results / f"{n}.json").read_text()) for n in ("test", "config"))
    settings = train_custom.parse(flags)
    model, _, batches = train_custom.begin(settings, common.splits(settings, args))
    flop = common.training_flop(model, batches)
    return {"flop": flop, "seconds": config["train_seconds"], **{k: test[k] for k in VIEWS}}


def plain(epochs: int, seed: int, args: Namespace) -> dict[str, float]:
    """The tutorial's loop for as many epochs, constant learning rate, on all training images."""
    settings = recipes.custom({"recipe": "classic", "val_fraction": 0.0, "limit": args.limit})
    splits = common.splits(settings, args)
    torch.manual_seed(seed)
    model, size = create_model("custom_cnn", {}, len(splits.classes)), settings.batch_size
    steps = epochs * (len(splits.train.labels) // size)  # the loop drops an epoch's partial batch
    begin = now(args.device)
    images = common.plain_steps(splits.train, splits.stats, model, size, args.device)
    count = sum(next(images) for _ in range(steps))
    seconds, flop = now(args.device) - begin, float(count * common.flop(model, 32))
    both = evaluation.predict_split(model, splits.test, splits.stats, 32, "crops")
    scores = (metrics.top1(logits, splits.test.labels.cpu()) for logits in both)
    return {"flop": flop, "seconds": seconds, **dict(zip(VIEWS, scores, strict=True))}


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: every training with its cost; then the shortest that reaches each accuracy."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows:  # equal in their operations too, or a recipe has changed meanwhile
        groups.setdefault((row["side"], row["epochs"], row["flop"]), []).append(row)

    def mean(group: list[dict[str, Any]], key: str) -> float:
        return statistics.mean(row[key] for row in group)

    text = common.markdown(
        [
            {
                **{"Training": side, "Epochs": str(epochs), "Seeds": str(len(group))},
                **{VIEWS[k]: common.spread([100 * row[k] for row in group]) for k in VIEWS},
                "PFLOP": f"{mean(group, 'flop') / 1e15:.3f}",
                "Minutes": f"{mean(group, 'seconds') / 60:.2f}",
            }
            for (side, epochs, _), group in groups.items()
        ]
    )

    def answer(side: str, key: str, target: float) -> str:
        good = [g for (of, *_), g in groups.items() if of == side and mean(g, key) >= target]
        if not good:
            return "not reached"
        best = min(good, key=lambda group: mean(group, "seconds"))
        cost = f"{mean(best, 'seconds') / 60:.2f} min, {mean(best, 'flop') / 1e15:.3f} PFLOP"
        return f"{cost}, {best[0]['epochs']} epochs"

    sides = dict.fromkeys(side for side, *_ in groups)
    for key, title in VIEWS.items():
        answers = [
            {title: f"{100 * target:.2f}", **{side: answer(side, key, target) for side in sides}}
            for target in TARGETS
        ]
        text += f"\n{common.markdown(answers)}"
    return text


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="SIDE:EPOCHS")
    parser.add_argument("--only", nargs="+", help="of these recipes alone, or plain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="images of each split, to try this out")
    args = parser.parse_args()
    rows = common.earlier(args)
    for seed in args.seeds:
        for side, _, epochs in (run.partition(":") for run in args.runs):
            row = {"side": side, "epochs": int(epochs), "seed": seed, "limit": args.limit}
            known = any(row.items() <= earlier.items() for earlier in rows)
            if known or (args.only and side not in args.only):
                continue
            options = int(epochs), seed, args
            figures = plain(*options) if side == "plain" else ours(side, *options)
            rows.append(common.measured(row | figures, args.device))
            common.write(args, rows)
            write_atomically(args.output.with_suffix(".md"), tables(rows))
    print(tables(rows))


if __name__ == "__main__":
    main()
