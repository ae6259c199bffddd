"""What `gpu.py` keeps of its trainings, and how it chooses a setting from them."""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.ablation import Change
from config.settings import Settings
from data import Arrays, Splits, make_splits

MOST_WORK = 1.1  # a chosen setting takes at most so many times the operations of the usual one
LEAST_SEEDS = 2  # of every setting, or nothing is chosen
USUAL = "as it is"

Train = Callable[[Change, int, str], dict[str, Any]]  # with a change, a seed, on "val" or "test"


class Rows:
    """The rows of a file, each written as soon as it is there.

    Args:
        path: JSON, a row a line. A line that a cut left unfinished is passed over.
        same: what every row of this measurement has; rows of others are not seen.
    """

    def __init__(self, path: Path, same: dict[str, Any]):
        self.path = path
        self.same = same
        self.rows: list[dict[str, Any]] = []
        self.begun = b""
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                continue
        if content and not content.endswith(b"\n"):
            self.begun = b"\n"

    def find(self, **key: Any) -> list[dict[str, Any]]:
        """The rows with these values."""
        wanted = self.same | key
        return [row for row in self.rows if wanted.items() <= row.items()]

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row, to the disk."""
        row = self.same | row
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(self.begun + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.begun = b""


class Clock:
    """A budget of seconds, from now on."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.begun_at = time.perf_counter()
        self.longest = 0.0  # of the trainings that were timed

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the budget is over."""
        return self.begun_at + share * self.seconds - time.perf_counter()

    def fits(self, share: float = 1.0) -> bool:
        """Whether another training would probably end in time."""
        return self.left(share) > self.longest

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Times a training."""
        begin = time.perf_counter()
        yield
        self.longest = max(self.longest, time.perf_counter() - begin)


@dataclass
class Bench:
    """What all steps need."""

    args: argparse.Namespace
    rows: Rows
    arrays: Arrays
    validating: Splits  # 45,000 images to train on, 5,000 to validate

    def settings(self, command: str, seed: int, **changes: Any) -> Any:
        """Those of a script's command, in one precision for all."""
        chosen = replace(common.settings_of(command), seed=seed, **changes)
        chosen = replace(chosen, precision=self.args.precision)
        if self.args.tiny:
            small = {"epochs": min(chosen.epochs, 2), "batch_size": min(chosen.batch_size, 8)}
            if chosen.image_size:
                small["image_size"] = 32
            chosen = replace(chosen, **small)
        return chosen

    def splits(self, settings: Settings, on: str) -> Splits:
        """To validate on, the same for all seeds; to test on, what the script would load."""
        if on == "val":
            return self.validating
        return make_splits(
            self.arrays,
            val_fraction=settings.val_fraction,
            limit=self.args.limit,
            seed=settings.seed,
            device=self.args.device,
        )


def search(
    bench: Bench,
    clock: Clock,
    train: Train,
    candidates: dict[str, Change],
    keys: list[dict[str, Any]],
    share: float = 1.0,
) -> None:
    """Trains what has no row yet, in this order, until a share of the budget is over.

    Args:
        bench: where the rows are.
        clock: of the step.
        train: see `Train`.
        candidates: the settings by name.
        keys: `step`, `kind` ("val" or "test"), `setting` and `seed` of each.
        share: of the budget.
    """
    for key in keys:
        if bench.rows.find(**key):
            continue
        if not clock.fits(share):
            print(f"the budget is over: {key['setting']}, seed {key['seed']}, was not begun")
            return
        with clock.timing():
            found = train(change_of(candidates, key["setting"]), key["seed"], key["kind"])
        bench.rows.add(key | found)


def ranked(rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Settings and their validation accuracies with TTA, the best first.

    Means are over the seeds that all of them have; where those are too few, there is no order.
    """
    by_setting: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == "val":
            by_setting.setdefault(row["setting"], {})[row["seed"]] = row["top1_tta"]
    shared = set.intersection(*(set(values) for values in by_setting.values()))
    means = {
        setting: statistics.mean(values[seed] for seed in shared)
        for setting, values in by_setting.items()
        if shared
    }
    return sorted(means.items(), key=lambda item: item[1], reverse=True)


def improve(
    bench: Bench,
    clock: Clock,
    step: str,
    train: Train,
    candidates: dict[str, Change],
    num_seeds: int,
    num_tests: int,
    is_paired: bool = False,
) -> None:
    """Searches a step's settings on validation images and tests the best one, once.

    Args:
        bench: where the rows are.
        clock: of the step; two thirds of it are for the search, a quarter is for the test.
        step: its name in the rows.
        train: see `Train`.
        candidates: the settings by name.
        num_seeds: of each setting in the search.
        num_tests: seeds of the chosen one.
        is_paired: try the best two together, too.
    """
    settings = list(candidates)
    least = min(LEAST_SEEDS, num_seeds)
    is_searched = bench.rows.find(step=step, kind="pair") or bench.rows.find(
        step=step, kind="choice"
    )
    if not is_searched:
        search(bench, clock, train, candidates, keys(settings, step, "val", num_seeds), 0.65)
    if bench.args.search_only:
        return
    if is_paired:
        pair = decide(bench, step, "pair", candidates, settings, least)
        if pair is None:
            return
        settings.append(pair)
        if not bench.rows.find(step=step, kind="choice"):
            search(bench, clock, train, candidates, keys([pair], step, "val", num_seeds), 0.75)
    chosen = decide(bench, step, "choice", candidates, settings, least)
    if chosen is not None:
        search(bench, clock, train, candidates, keys([chosen], step, "test", num_tests))


def keys(settings: list[str], step: str, kind: str, num_seeds: int) -> list[dict[str, Any]]:
    """What names a row, for each seed of each setting; all settings get a seed before the next."""
    return [
        {"step": step, "kind": kind, "setting": setting, "seed": seed}
        for seed in range(num_seeds)
        for setting in settings
    ]


def decide(
    bench: Bench,
    step: str,
    what: str,
    candidates: dict[str, Change],
    settings: list[str],
    least: int,
) -> str | None:
    """The pair that is worth a try, or the choice: as it was made, else made now.

    Args:
        bench: where the rows are.
        step: its name in the rows.
        what: "pair" or "choice".
        candidates: the settings by name.
        settings: names of those, and of a pair, that are to have rows.
        least: number of seeds that all of them must have.

    Returns:
        None where the settings have too few seeds in common.
    """
    made = bench.rows.find(step=step, kind=what)
    if made:
        return made[0]["setting"]
    rows = bench.rows.find(step=step, kind="val")
    seeds = [{row["seed"] for row in rows if row["setting"] == setting} for setting in settings]
    num_shared = len(set.intersection(*seeds))
    if num_shared < least:
        print(f"{step}: nothing is chosen of {num_shared} seeds that all settings have")
        return None
    order = [name for name, _ in ranked(rows)]
    if what == "pair":
        setting = best_pair(candidates, [name for name in order if name != USUAL])
    else:
        work = {row["setting"]: row["pflop"] for row in rows}
        limit = MOST_WORK * work.get(USUAL, max(work.values()))
        setting = next(name for name in order if work[name] <= limit)
    bench.rows.add({"step": step, "kind": what, "setting": setting, "num_seeds": num_shared})
    return setting


def best_pair(candidates: dict[str, Change], order: list[str]) -> str:
    """The best setting with the next one that changes something else, as one name."""
    for first, second in itertools.combinations(order, 2):
        a = candidates[first]
        b = candidates[second]
        touched = a.settings.keys() & b.settings.keys()
        if not touched and not (a.network and b.network) and not (a.averaging and b.averaging):
            return f"{first} + {second}"
    raise ValueError("all settings change the same")


def change_of(candidates: dict[str, Change], setting: str) -> Change:
    """A setting's change, or that of a pair."""
    whole = Change()
    for name in setting.split(" + "):
        part = candidates[name]
        whole = Change(
            settings=whole.settings | part.settings,
            network=whole.network | part.network,
            averaging=whole.averaging + part.averaging,  # a pair has one at most
        )
    return whole
