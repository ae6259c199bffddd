import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, PIPED, ROOT, SMALL, command

import finetune
import train_custom
from config import commandline, recipes
from config.settings import CustomSettings, FineTuneSettings, name_fault, sizes
from errors import Stopped, UnusableInput, printable

SCRIPTS = ("train_custom", "finetune", "evaluate")
# These take seconds to load: who asks for help, or is stopped at once, must not wait for them.
HELP = """
import runpy, sys
sys.argv[1:] = ["--help"]
try: runpy.run_path("{0}.py", run_name="__main__")
except SystemExit as end: assert not end.code
assert not {{"torch", "numpy", "torchvision", "matplotlib"}} & sys.modules.keys()
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_80_columns_and_loads_no_slow_library(script):
    words = [sys.executable, "-c", HELP.format(script)]
    environment = ENVIRONMENT | {"COLUMNS": "80"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


@pytest.mark.parametrize(
    ("kind", "table", "usual"),
    [
        (CustomSettings, recipes.BY_RECIPE, "modern"),
        (FineTuneSettings, recipes.BY_NETWORK, "resnet18"),
    ],
)
def test_help_shows_every_default_and_those_of_each_recipe_and_network(kind, table, usual):
    parser = commandline.Parser("x.py", "", "")
    commandline.add_flags(parser, kind, table, usual)
    shown = {action.dest: action.help for action in parser._actions}
    for field in dataclasses.fields(kind):
        line = shown[field.name]
        assert field.metadata["help"] in line
        assert "(default: " in line
        values = {name: own[field.name] for name, own in table.items() if field.name in own}
        for name, value in values.items():
            words = value if isinstance(value, str) else f"{value:g}"
            if name == usual:
                assert f"(default: {words or 'none'}" in line, field.name
            elif value != values[usual]:
                assert f"{name} {words or 'none'}" in line, field.name


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (train_custom, "", {"recipe": "modern", "small_first": "0.5:24"}),
        (train_custom, "--recipe speedrun --lr 0.5", {"optimizer": "muon", "lr": 0.5}),
        # What is small beside one size is large beside another.
        (train_custom, "--image-size 64", {"small_first": ""}),
        (train_custom, "--image-size 64 --small-first .5:48", {"small_first": ".5:48"}),
        (finetune, "", {"unfreeze": "most", "epochs": 4, "translate": 2}),
        (finetune, "--unfreeze last", {"epochs": 5, "translate": 0}),
        (finetune, "--arch mobilenet_v3_small", {"unfreeze": "all"}),
        (finetune, "--arch vgg19 --unfreeze all", {"epochs": 10, "translate": 2}),
        (finetune, "--weights none", {"unfreeze": "all", "epochs": 10, "stage_lr_scale": 1.0}),
        (finetune, "--weights none --epochs 4", {"unfreeze": "all", "epochs": 4}),
        (finetune, "--weights none --unfreeze head", {"unfreeze": "head"}),
        (finetune, "", {"average": 0.0, "rounds": 1}),
    ],
)
def test_defaults_follow_recipe_network_and_part_and_flags_replace_them(script, flags, expected):
    settings = script.parse(shlex.split(flags))
    assert {name: getattr(settings, name) for name in expected} == expected


def test_changes_of_a_recipe_are_named_but_seed_device_and_files_are_none():
    fast = train_custom.parse(["--recipe", "speedrun", "--lr", "0.5", "--seed", "3"])
    assert recipes.changed(fast, 50_000) == {"lr": 0.5}
    here = train_custom.parse(["--device", "cpu", "--save-every", "9"])
    assert recipes.changed(here, 50_000) == {}
    own = recipes.by_number(finetune.parse(["--pictures", "p", "--dropout", "0.5"]), 300)
    assert recipes.changed(own, 300) == {"pictures": "p", "dropout": 0.5}
    large = recipes.by_number(finetune.parse(["--pictures", "p"], lambda folder: 400), 300)
    assert recipes.changed(large, 300) == {"pictures": "p"}
    larger = recipes.by_number(finetune.parse(["--pictures", "p", "--image-size", "256"]), 300)
    assert recipes.changed(larger, 300) == {"pictures": "p", "image_size": 256}
    cifar10 = finetune.parse(["--image-size", "224"])
    assert recipes.changed(cifar10, 48_000) == {"image_size": 224}


@pytest.mark.parametrize(
    ("flags", "median_side", "expected"),
    [
        ("", 191, 160),
        ("", 192, 192),
        ("--image-size 96", 400, 96),
        ("--arch vgg19", 400, 80),
    ],
)
def test_large_pictures_show_resnet18_more_pixels(flags, median_side, expected):
    words = ["--pictures", "p", *shlex.split(flags)]
    settings = finetune.parse(words, lambda folder: median_side)
    assert settings.image_size == expected


@pytest.mark.parametrize(
    ("script", "flags", "num_images", "batch_size", "epochs", "rounds"),
    [
        (finetune, "", 300, 32, 12, 4),
        (finetune, "", 999, 32, 4, 4),
        (finetune, "", 1_000, 32, 4, 2),
        (finetune, "", 4_999, 64, 4, 2),
        (finetune, "", 5_000, 64, 4, 1),
        (finetune, "", 20_000, 128, 4, 1),
        (finetune, "--arch resnet50", 20_000, 128, 3, 1),
        (finetune, "--arch resnet50", 300, 32, 10, 1),
        (finetune, "--unfreeze last", 950, 32, 8, 4),
        (finetune, "", 10, 10, 120, 4),
        (finetune, "--weights none", 300, 32, 100, 1),
        (finetune, "--average 0", 300, 32, 10, 1),
        (finetune, "--small-first 0.5:96", 300, 32, 10, 1),
        (finetune, "--average 0.3 --rounds 2", 2_000, 32, 4, 2),
        (finetune, "--epochs 1", 300, 32, 1, 1),
        (finetune, "--epochs 3", 300, 32, 3, 3),
        (finetune, "--epochs 10", 300, 32, 10, 2),
        (finetune, "--epochs 4", 18, 18, 4, 2),
        (finetune, "--epochs 1 --batch-size 4", 18, 4, 1, 1),
        (finetune, "--batch-size 100", 300, 100, 40, 4),
        (train_custom, "", 300, 32, 100, None),
        (train_custom, "", 50_000, 512, 20, None),
        (train_custom, "--recipe best", 300, 32, 100, None),
    ],
)
def test_batches_epochs_and_rounds_follow_from_the_number_of_own_pictures_unless_given(
    script, flags, num_images, batch_size, epochs, rounds
):
    settings = script.parse(["--pictures", "p", *shlex.split(flags)])
    settled = recipes.by_number(settings, num_images)
    assert (settled.batch_size, settled.epochs) == (batch_size, epochs)
    assert getattr(settled, "rounds", None) == rounds
    assert (getattr(settled, "average", 0) > 0) == ((rounds or 1) > 1)
    assert recipes.by_number(settled, 7) == settled


def test_sizes_are_read_from_small_first():
    assert sizes("0.3:16,0.6:24") == ((0.3, 16), (0.6, 24))


UNUSABLE = """
train_custom --epochs 0              | --epochs 0: must be at least 1
train_custom --epochs -3             | --epochs -3: must be at least 1
finetune --rounds 3                  | --rounds 3: what they learn is averaged; add --average
finetune --rounds 3 --average 0.5 --epochs 4  | --rounds 3: they must divide the 4 epochs
finetune --rounds 2 --average 0.5 --small-first 0.5:64 | --rounds 2: the first ones would not
finetune --limit 128 --epochs 2 --rounds 2 --average 0.01 | --average 0.01: is less than a step
train_custom --epochs many           | invalid int value: 'many'; see --help
train_custom --batch-size 400        | --batch-size 400: there are 310 training images; take
train_custom --limit 0               | --limit 0: must be at least 4
train_custom --recipe classic --muon-lr 0.1 | --muon-lr 0.1: adam has no such rate; add --optimizer
train_custom --recipe classic --muon-lr 0 | --muon-lr 0.0: adam has no such rate; add --optimizer
train_custom --recipe best-ever      | best-ever is unknown: choose from classic, modern
train_custom --network huge          | --network huge: choose from tutorial, slim
train_custom --lr nan                | --lr nan: must be at least
train_custom --small-first 0.5:8     | --small-first 0.5:8: must be shares of the steps, rising
train_custom --small-first .6:24,.3:16 | --small-first .6:24,.3:16: must be
train_custom --small-first 1:24      | --small-first 1:24: must be
train_custom --run-name ../x         | folders go in --checkpoint-dir and --results-dir
train_custom --results-dir data/cifar10.npz | --results-dir data/cifar10.npz: cannot be made
train_custom --weights absent.pt --batch-size 64 | --weights absent.pt: no such file
train_custom --weights imagenet --batch-size 64 | --weights imagenet: there are none of this network
train_custom --translate 32            | --translate 32: must be at least 0 and below 32
train_custom --pictures absent       | absent: no such folder
train_custom --device toaster        | --device toaster: choose auto, cpu
train_custom --device cuda           | --device cuda: torch
train_custom --frobnicate            | unrecognized arguments: --frobnicate; see --help
finetune --arch resnet19             | resnet19 is unknown: choose from vgg19, resnet18
finetune --image-size 8              | --image-size 8: must be at least 16
finetune --weights absent.pth        | --weights absent.pth: no such file; or imagenet, or none
finetune --weights data/cifar10.npz  | data/cifar10.npz
finetune --weights other.pth         | other.pth: the weights lack
finetune --weights nan.pth           | its 'x' holds numbers that are not finite
train_custom --weights nan.pth --batch-size 64 | its 'x' holds numbers that are not finite
finetune --unfreeze last --translate 2 | add --no-cache
finetune --unfreeze head --stage-lr-scale 0.1 | --stage-lr-scale 0.1: with --unfreeze head no stage
finetune --unfreeze some             | --unfreeze some: choose from head, last, most, all
evaluate                             | no finished checkpoint in checkpoints/: run `python train
evaluate absent.pt                   | absent.pt
evaluate a.pt --batch-size 0         | --batch-size 0: must be at least 1
evaluate a.pt b.pt --predict a --figure x.png | --figure takes one checkpoint, not 2
evaluate a.pt --figure x.png         | --figure draws what --predict saw: give --predict PATH too
evaluate a.pt --tta many             | choose from
"""


def test_the_recipe_best_is_the_run_whose_figures_are_given_for_it():
    ran = json.loads((ROOT / "results/reference/best-wide/config.json").read_text())["config"]
    best = train_custom.parse(["--recipe", "best"]).plain()
    for name in best.keys() & ran.keys() - {"run_name"}:
        assert best[name] == ran[name], name


@pytest.mark.parametrize("line", UNUSABLE.strip().splitlines())
def test_unusable_input_is_one_line_and_exit_code_2(workplace, refused, line):
    if "--device cuda " in line and torch.cuda.is_available():
        pytest.skip("there is one")
    torch.save({"layer.weight": torch.zeros(2)}, "other.pth")
    torch.save({"x": torch.tensor([0, torch.nan])}, "nan.pth")
    words, message = (part.strip() for part in line.split("|"))
    assert message in refused(*words.split())
    assert not list(workplace.glob("checkpoints/*"))  # no lock is left either


@pytest.mark.parametrize("name", ["猫" * 40, "a/b", "a.pt", "CON", "lpt1.x", "x.", "-x", "", "a b"])
def test_names_that_make_no_file_on_some_system_are_refused(name):
    assert name_fault(name)


def test_a_plain_name_is_taken():
    assert not name_fault("run-2.b_+")


def ending(error=None):
    """The exit code of a script that raises an error, or none."""

    def script():
        if error:
            raise error

    return commandline.exit_code(script)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UnusableInput("x\n\x1b[2Jy"), 2, "error: x \\x1b[2Jy"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (OSError(28, "No space left"), 1, "error: [Errno 28] No space left"),
        (MemoryError(), 1, "error: MemoryError"),
        (FloatingPointError("not finite"), 1, "error: not finite"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--no-cache"),
    ],
)
def test_what_a_user_can_meet_is_one_line_and_its_exit_code(capsys, error, code, words):
    assert ending(error) == code
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_a_script_that_ends_well_says_nothing_and_returns_0(capsys):
    assert ending() == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError])
def test_a_mistake_in_the_code_shows_its_traceback(kind):
    with pytest.raises(kind):
        ending(kind("x"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_ctrl_c_while_torch_is_loaded_is_one_line_and_130(tmp_path, library):
    script = [sys.executable, str(ROOT / "train_custom.py")]
    training = subprocess.Popen(script, cwd=tmp_path, **PIPED)
    while library not in Path(f"/proc/{training.pid}/maps").read_text():
        time.sleep(0.001)
    training.send_signal(signal.SIGINT)
    _, error = training.communicate(timeout=60)
    assert (training.returncode, error) == (130, "stopped by SIGINT\n")
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.skipif(os.name == "nt", reason="needs a Unix shell")
@pytest.mark.parametrize("where", ["| head -2", ">&- 2>&-", "> /dev/full 2>&1"])
def test_a_training_ends_well_though_nobody_can_be_printed_to(workplace, where):
    words = shlex.join(command(*SMALL, "--limit", "64"))
    shell = ["sh", "-c", f"( {words}; echo $? > code.txt ) {where}"]
    done = subprocess.run(shell, **PIPED, timeout=120)
    assert (workplace / "code.txt").read_text() == "0\n", done.stderr
    assert done.stderr == ""
    assert (workplace / "checkpoints/custom_cnn.pt").exists()
    assert (workplace / "results/custom_cnn/test.json").exists()


def test_a_stream_escapes_what_it_cannot_encode():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = commandline.LastingStream(narrow)
    assert stream.write("猫.jpg ✓") == 7
    stream.flush()
    assert narrow.buffer.getvalue() == b"\\u732b.jpg \\u2713"


def test_a_stream_whose_reader_has_gone_drops_the_rest_and_leaves_no_file_open():
    closed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = commandline.LastingStream(closed)
    closed.close()
    free = os.dup(2)
    stream.write("more")
    stream.flush()
    os.close(free)
    assert os.dup(2) == free
    os.close(free)


def test_main_in_a_thread_trains_and_leaves_the_signals_alone(run):
    before = signal.getsignal(signal.SIGINT)
    done = []
    thread = threading.Thread(target=lambda: done.append(run(*SMALL, "--limit", "64")))
    thread.start()
    thread.join(timeout=120)
    assert [result.code for result in done] == [0]
    assert signal.getsignal(signal.SIGINT) == before
    assert Path("checkpoints/custom_cnn.pt").exists()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_printed_commands_name_the_script_from_where_the_user_stands(
    tmp_path, monkeypatch, elsewhere
):
    monkeypatch.chdir(tmp_path if elsewhere else ROOT)
    words = commandline.command_words("evaluate.py", ["--pictures", "it's here"])
    script = str(ROOT / "evaluate.py") if elsewhere else "evaluate.py"
    assert words[1:] == [script, "--pictures", "it's here"]
    assert shlex.split(commandline.quoted(words)) == words


def test_printed_commands_are_quoted_as_windows_reads_them(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        quoted = commandline.quoted(["x.py", "--pictures", "it's here"])
    assert quoted == 'x.py --pictures "it\'s here"'


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\tb\n\x1b[31m\u202ec\x00", "a b \\x1b[31m\\u202ec\\x00"),
        ("\udcff", "\\udcff"),
        ("猫 é", "猫 é"),
        (" \n", "' \\n'"),
    ],
)
def test_names_reach_the_terminal_on_one_line_without_escape_sequences(name, shown):
    assert printable(name) == shown


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_what_a_run_writes_is_ignored_by_git_and_what_comes_with_the_clone_is_not():
    written = [
        "checkpoints/custom_cnn.pt",
        "checkpoints/a.resume.pt",
        "data/cifar10.npz",
        "results/custom_cnn/config.json",
        "results/README.md",
        "results/index.html",
    ]
    brought = ["checkpoints/custom_cnn-modern.pt", "results/reference/README.md", "data.py"]
    git = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *written, *brought]
    done = subprocess.run(git, capture_output=True, text=True)
    assert done.stdout.split() == written
