import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

import finetune
import models
import train_custom
from config import recipes
from config.settings import ABSENT
from display import tables
from storage.files import write_json

HARDWARE = "2 cores | <x>"


def write_run(folder, seed, top1, arguments=(), **changes):
    """Leaves what a run of `train_custom.py` with these arguments leaves."""
    settings = train_custom.parse(
        ["--recipe", "classic", "--seed", str(seed), "--run-name", "a", *arguments]
    )
    run = {
        "arch": "custom_cnn",
        "surgery": models.NETWORKS[settings.network] | {"momentum": settings.batchnorm_momentum},
        "config": settings.plain() | {"run_name": folder.name},
        "changed": recipes.changed(settings, 50_000),
        "start_weights": {"source": "random"},
        "precision": "bf16",
        "environment": {"hardware": HARDWARE},
        "parameters": {"total": 1_500_000},
        "train_seconds": 90.0,
        "date": "2025-01-01",
    }
    write_json(folder / "config.json", run | changes)
    write_json(folder / "test.json", {"top1": top1, "top1_tta": None})


def groups(results_dir):
    """The lines of the second table: what was pooled."""
    _, _, second = tables.comparison_table(tables.comparison_rows(results_dir)).partition("Mean ±")
    return [line for line in second.splitlines() if line.startswith("| custom")]


def test_comparison_sorts_escapes_and_averages_over_seeds(tmp_path, capsys):
    write_run(tmp_path / "the[first]_run_", 0, 0.90)
    write_run(tmp_path / "second", 1, 0.92)
    write_run(tmp_path / "other", 0, 0.91, ["--epochs", "20", "--lr", "0.1"])
    rows = tables.write(tmp_path)
    assert [row["run"] for row in rows] == ["second", "other", "the[first]_run_"]
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert (
        r"| [the\[first\]\_run\_](the%5Bfirst%5D_run_/) | custom_cnn | classic | none | 30 "
        r"| 2 cores \| \<x\> | 90.00 | - | 1.5 | 1.5 | 0 | 2025-01-01 |"
    ) in lines
    assert "| classic (epochs 20, lr 0.1) |" in next(line for line in lines if "[other]" in line)
    assert (
        lines[-1]
        == r"| custom_cnn | classic | none | 30 | 2 cores \| \<x\> | 2 | 91.00 ± 1.41 | - | 1.5 |"
    )
    assert "the[first]_run_" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""


def test_a_run_of_before_a_setting_existed_is_pooled_with_one_of_its_default(tmp_path):
    write_run(tmp_path / "new", 0, 0.90)
    for name, without in (("old", 1), ("older", 2)):
        write_run(tmp_path / name, without, 0.92)
        run = tables._read(tmp_path / name / "config.json")
        for key in (*ABSENT, "network"):
            run["config"].pop(key, None)  # those of finetune.py are not there
        del run["surgery"]["momentum"], run["changed"]
        write_json(tmp_path / name / "config.json", run | {"start_weights": None})
    [line] = groups(tmp_path)
    assert "| 3 | 91.33 ± 1.15 |" in line
    # A setting that is added needs its former value there, or it splits every group.
    for run, script in (("custom_cnn-classic", train_custom), ("resnet18", finetune)):
        committed = tables._read(ROOT / f"results/reference/{run}/config.json")["config"]
        today = script.parse([]).plain()
        assert today.keys() - committed.keys() <= {*ABSENT, "network"}


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": ["--limit", "500"]},
        {"arguments": ["--lr", "0.1"]},
        {"arguments": ["--network", "slim"]},
        {"environment": {"hardware": "a GPU"}},
        {"precision": "fp32"},
        {"start_weights": {"source": "checkpoint", "file": "a.pt", "sha256": "0"}},
    ],
    ids=str,
)
def test_runs_that_differ_in_more_than_their_seed_are_never_pooled(tmp_path, changes):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed, 0.9)
    write_run(tmp_path / "b", 2, 0.5, **changes)
    [line] = groups(tmp_path)
    assert "| 2 | 90.00 ± 0.00 |" in line


def test_a_seed_counts_once_and_runs_on_part_of_the_data_are_marked_and_never_pooled(tmp_path):
    for name, seed, top1 in (("a", 0, 0.9), ("b", 0, 0.8)):
        write_run(tmp_path / name, seed, top1)
    assert groups(tmp_path) == []  # a repeated seed says nothing about the spread
    for seed in (1, 2):
        write_run(tmp_path / f"part{seed}", seed, 0.99, ["--limit", "2000"])
    assert groups(tmp_path) == []
    rows = tables.comparison_rows(tmp_path)
    assert [row["run"] for row in rows] == ["a", "b", "part1", "part2"]
    assert "| 99.00 (first 2,000 images) |" in tables.comparison_table(rows)
    shown = tables.terminal_table(rows).splitlines()
    assert ["part" in line for line in shown] == [False] * 3 + [True] * 2
    assert max(map(len, shown)) <= 80
    write_run(tmp_path / "c", 1, 0.9, train_seconds=None)  # as an old file may be
    assert groups(tmp_path)[0].endswith("| 2 | 85.00 ± 7.07 | - | - |")


def test_runs_without_readable_files_are_left_out_with_one_line_each(tmp_path, capsys):
    write_run(tmp_path / "whole-with-a-very-long-name-that-goes-on-and-on", 123456789, 0.9)
    write_run(tmp_path / "cut", 0, 0.9)
    (tmp_path / "cut/test.json").write_text('{"top1": 0.9')
    write_run(tmp_path / "list", 0, 0.9)
    (tmp_path / "list/config.json").write_text("[]")
    write_run(tmp_path / "nan", 0, 0.9)
    (tmp_path / "nan/test.json").write_text('{"top1": NaN}')
    write_run(tmp_path / "odd", 0, 0.9, config=[], environment="x")
    write_run(tmp_path / "time", 0, 0.9, train_seconds="fast")
    write_run(tmp_path / "tta", 0, 0.9)
    (tmp_path / "tta/test.json").write_text('{"top1": 0.9, "top1_tta": "x"}')
    write_run(tmp_path / "running", 0, 0.9)
    (tmp_path / "running/test.json").unlink()  # that of a run beside this one is no news
    write_json(tmp_path / "benchmark/numbers.json", {})
    rows = tables.comparison_rows(tmp_path)
    notes = capsys.readouterr().err.splitlines()
    left_out = [note.split(":")[0].rsplit("/")[-1] for note in notes]
    assert left_out == ["cut", "list", "nan", "odd", "time", "tta"]
    head, line = tables.terminal_table(rows).splitlines()
    assert len(head) == len(line) <= 80
    assert "±" not in tables.comparison_table(rows)


def test_a_readme_or_page_of_the_users_own_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# My project")
    tables.write(tmp_path)
    tables.write(tmp_path)  # and our own page is written anew without a word
    assert (tmp_path / "README.md").read_text() == "# My project"
    assert "All runs" in (tmp_path / "index.html").read_text()
    assert capsys.readouterr().out.count("left as it is") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode on disk")
def test_evaluate_lists_a_run_whose_name_on_disk_is_no_utf8(run):
    assert run(*SMALL).code == 0
    shutil.copytree("results/custom_cnn", "results/" + os.fsdecode(b"caf\xe9"))
    shutil.copy("checkpoints/custom_cnn.pt", "checkpoints/again.pt")  # two: a table is printed
    done = run("evaluate")
    assert done.code == 0, done.err
    assert r"caf\udce9" in done.out
    assert r"[caf\\udce9](caf%E9/)" in Path("results/README.md").read_text(encoding="utf-8")
    assert 'href="caf%E9/index.html"' in Path("results/index.html").read_text(encoding="utf-8")


def test_accuracies_over_different_views_say_so_and_have_no_common_mean(tmp_path):
    for seed, views in ((0, "crops"), (1, "crops")):
        write_run(tmp_path / f"a{seed}", seed, 0.9)
        report = {"top1": 0.9, "top1_tta": 0.92 + seed / 100, "tta": views}
        write_json(tmp_path / f"a{seed}/test.json", report)
    [line] = groups(tmp_path)
    assert "| 90.00 ± 0.00 | 92.50 ± 0.71 (crops) |" in line
    write_json(tmp_path / "a1/test.json", {"top1": 0.9, "top1_tta": 0.8, "tta": "shifts"})
    [line] = groups(tmp_path)
    assert "| 90.00 ± 0.00 | - |" in line
    table = tables.comparison_table(tables.comparison_rows(tmp_path))
    assert "| 92.00 (crops) |" in table
    assert "| 80.00 (shifts) |" in table


def test_an_accuracy_on_few_test_images_says_how_many(tmp_path):
    write_run(tmp_path / "a", 0, 0.9)
    write_json(tmp_path / "a/test.json", {"top1": 0.9, "n": 60})
    assert "| 90.00 (tested on 60) |" in tables.comparison_table(tables.comparison_rows(tmp_path))


def test_no_runs_make_a_table_that_says_so(tmp_path):
    assert tables.write(tmp_path / "absent") == []
    assert "No finished run yet" in (tmp_path / "absent/README.md").read_text()
    assert "no finished run yet" in tables.terminal_table([])


# Writes its own run, then the tables. The first waits, its lock held and the runs read, until the
# other stands before the lock.
WRITER = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from display import tables
from storage.files import write_json

name = sys.argv[2]
read = tables.comparison_rows
lock = tables.locked

def comparison_rows(folder):
    rows = read(folder)
    if name == "first":
        pathlib.Path("has-read").touch()
        while not pathlib.Path("at-the-lock").exists():
            time.sleep(0.01)
    return rows

def locked(*arguments, **more):
    if name == "second":
        pathlib.Path("at-the-lock").touch()
    return lock(*arguments, **more)

tables.comparison_rows = comparison_rows
tables.locked = locked
write_json(pathlib.Path(f"results/{name}/config.json"), {"arch": name})
write_json(pathlib.Path(f"results/{name}/test.json"), {"top1": 0.5})
tables.write(pathlib.Path("results"))
"""


def test_two_runs_that_end_at_once_both_stand_in_the_table(tmp_path):
    def writer(name):
        return subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT), name], cwd=tmp_path)

    first = writer("first")
    while not (tmp_path / "has-read").exists() and first.poll() is None:
        time.sleep(0.01)
    second = writer("second")
    assert [second.wait(60), first.wait(60)] == [0, 0]
    table = (tmp_path / "results/README.md").read_text()
    assert "[first]" in table
    assert "[second]" in table
