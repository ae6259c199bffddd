"""The search of `benchmarks/gpu.py`: what a cut leaves is used, and no test image chooses."""

import argparse

from benchmarks.ablation import Change
from benchmarks.gpu_search import USUAL, Bench, Clock, Rows, improve, ranked
from benchmarks.gpu_times import evaluations

CANDIDATES = {
    USUAL: Change(),
    "few": Change({"epochs": 9}),
    "wide": Change(network={"widths": (1,)}),
    "none": Change({"epochs": 1}),
}
WORTH = {"epochs": {9: 0.02, 1: -0.1}}


def searched(path, trained):
    """Runs the search; notes what it trains."""

    def train(change, seed, on):
        trained.append((tuple(change.settings.items()), tuple(change.network), seed, on))
        gain = WORTH["epochs"].get(change.settings.get("epochs"), 0) + 0.01 * len(change.network)
        return {"top1_tta": 0.9 + gain if on == "val" else 0.5, "pflop": 1.0}

    rows = Rows(path, {"hardware": "a", "tiny": False})
    bench = Bench(argparse.Namespace(search_only=False), rows, None, None)
    improve(bench, Clock(100), "speedrun", train, CANDIDATES, 3, 2, is_paired=True)
    return rows


def test_search_goes_on_where_a_cut_left_it_and_tests_what_validated_best(tmp_path):
    whole, path = [], tmp_path / "rows.jsonl"
    rows = searched(path, whole)
    assert rows.find(kind="choice")[0]["setting"] == "few + wide"
    assert [on for *_, on in whole] == ["val"] * 15 + ["test"] * 2
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # cut in the sixth row
    rest = []
    assert searched(path, rest).find(kind="test") == rows.find(kind="test")
    assert rest == whole[5:]
    again = []
    searched(path, again)
    assert not again


def test_settings_are_ranked_by_validation_over_shared_seeds_alone(tmp_path):
    values = [("a", "val", 0, 0.5), ("b", "val", 0, 0.4), ("b", "val", 1, 0.9), ("b", "test", 0, 1)]
    names = ("setting", "kind", "seed", "top1_tta")
    rows = [dict(zip(names, value, strict=True)) for value in values]
    assert ranked(rows) == [("a", 0.5), ("b", 0.4)]


def test_rows_of_other_hardware_are_not_seen(tmp_path):
    Rows(tmp_path / "rows", {"hardware": "a"}).add({"seed": 0})
    assert not Rows(tmp_path / "rows", {"hardware": "b"}).find(seed=0)
    assert Rows(tmp_path / "rows", {"hardware": "a"}).find(seed=0)


def test_the_records_output_is_read_without_its_warm_up():
    printed = "| warmup | 7 | 0.1 | 0.1 | | 9.0 |\n| | eval | 0.1234 | 0.1000 | 0.1010 | 9.9000 |\n"
    printed += "noise\n|  0  | 0 | 0.5 | 0.5 |  | 0.3 |\n"
    printed += "|    |  eval  |  0.9912  |  0.9321  |  0.9403  |  2.5900  |\n|   | eval |"
    assert evaluations(printed) == [(0.9403, 2.59)]
