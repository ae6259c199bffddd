import dataclasses
import io
import os
import resource
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

HELP = """
import sys, {0} as script
try: script.main(["--help"])
except SystemExit as end: assert not end.code
assert not {{"torch", "numpy", "torchvision", "matplotlib"}} & sys.modules.keys()
"""


@pytest.mark.parametrize("script", ["train_custom", "finetune", "evaluate"])
def test_help_answers_at_once_within_80_columns_without_torch(script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    words = [sys.executable, "-c", HELP.format(script)]
    done = subprocess.run(words, cwd=ROOT, **PIPED | {"env": ENVIRONMENT | {"COLUMNS": "80"}})
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("kind", "table", "usual"),
    [
        (CustomSettings, recipes.BY_RECIPE, "modern"),
        (FineTuneSettings, recipes.BY_NETWORK, "resnet18"),
    ],
)
def test_help_shows_every_default_those_of_each_recipe_and_network_too(kind, table, usual):
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


def test_recipes_and_networks_bring_their_defaults_and_changes_are_named():
    fast = train_custom.parse(["--recipe", "speedrun", "--lr", "0.5", "--seed", "3"])
    assert (fast.optimizer, fast.lr, fast.seed) == ("muon", 0.5, 3)
    assert recipes.changed(fast) == {"lr": 0.5}  # a seed changes no recipe
    assert train_custom.parse([]).recipe == "modern"
    assert recipes.changed(train_custom.parse(["--device", "cpu", "--save-every", "9"])) == {}
    usual, last = map(finetune.parse, ([], ["--unfreeze", "last"]))
    assert (usual.unfreeze, usual.epochs, usual.translate) == ("most", 4, 2)
    assert (last.epochs, last.translate) == (5, 0)
    # What is small beside one size is large beside another.
    sides = [["--image-size", "64"], ["--image-size", "64", "--small-first", ".5:48"], []]
    assert [train_custom.parse(s).small_first for s in sides] == ["", ".5:48", "0.5:24"]
    every, scratch = (
        finetune.parse(["--arch", "vgg19", *more])
        for more in (["--unfreeze", "all"], ["--weights", "none", "--epochs", "4"])
    )
    assert (every.epochs, every.translate) == (10, 2)
    assert (scratch.unfreeze, scratch.epochs, scratch.stage_lr_scale) == ("all", 4, 1.0)
    assert finetune.parse(["--weights", "none"]).epochs == 10
    assert finetune.parse(["--weights", "none", "--unfreeze", "head"]).unfreeze == "head"
    assert finetune.parse(["--arch", "mobilenet_v3_small"]).unfreeze == "all"
    assert sizes("0.3:16,0.6:24") == ((0.3, 16), (0.6, 24))


UNUSABLE = """
train_custom --epochs 0              | --epochs 0: must be at least 1
train_custom --epochs -3             | --epochs -3: must be at least 1
train_custom --epochs many           | invalid int value: 'many'; see --help
train_custom --batch-size 400        | --batch-size 400: there are 310 training images; take
train_custom --limit 0               | --limit 0: must be at least 4
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
train_custom --translate 32 --batch-size 64 | --translate 32: the images have 32 pixels
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
finetune --unfreeze some             | --unfreeze some: choose from head, last, most, all
evaluate                             | no finished checkpoint in checkpoints/: run `python train
evaluate absent.pt                   | absent.pt
evaluate a.pt --batch-size 0         | --batch-size 0: must be at least 1
evaluate a.pt b.pt --predict a --figure x.png | --figure takes one checkpoint, not 2
evaluate a.pt --figure x.png         | --figure draws what --predict saw: give --predict PATH too
evaluate a.pt --predict a --predictions x.csv | --predictions is of the test images
evaluate a.pt --tta many             | choose from
"""


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
    assert not name_fault("run-2.b_+")


def test_exit_codes_and_mistakes(capsys):
    def ending(error):
        def script():
            if error:
                raise error

        return commandline.exit_code(script)

    assert ending(None) == 0
    assert capsys.readouterr().err == ""
    for error, code, words in (
        (UnusableInput("x\n\x1b[2Jy"), 2, "error: x \\x1b[2Jy"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (OSError(28, "No space left"), 1, "error: [Errno 28] No space left"),
        (MemoryError(), 1, "error: MemoryError"),
        (FloatingPointError("not finite"), 1, "error: not finite"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--no-cache"),
    ):
        assert ending(error) == code
        printed = capsys.readouterr().err
        assert words in printed
        assert printed.count("\n") == 1
    for mistake in (ValueError("x"), TypeError("x"), RuntimeError("shapes"), KeyError("x")):
        with pytest.raises(type(mistake)):
            ending(mistake)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("later", [0.0, 0.2, 0.5])
def test_ctrl_c_while_torch_is_loaded_is_one_line_and_130(tmp_path, later):
    script = [sys.executable, str(ROOT / "train_custom.py")]
    training = subprocess.Popen(script, cwd=tmp_path, **PIPED)
    while "libtorch" not in Path(f"/proc/{training.pid}/maps").read_text():
        time.sleep(0.01)
    time.sleep(later)
    training.send_signal(signal.SIGINT)
    _, error = training.communicate(timeout=60)
    assert (training.returncode, error) == (130, "stopped by SIGINT\n")
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.skipif(os.name == "nt", reason="needs a Unix shell")
@pytest.mark.parametrize("where", ["| head -2", ">&- 2>&-", "> /dev/full 2>&1"])
def test_printing_never_ends_a_training(workplace, where):
    words = shlex.join(command(*SMALL, "--limit", "64"))
    shell = ["sh", "-c", f"( {words}; echo $? > code.txt ) {where}"]
    done = subprocess.run(shell, **PIPED, timeout=120)
    assert (workplace / "code.txt").read_text() == "0\n", done.stderr
    assert done.stderr == ""
    assert (workplace / "checkpoints/custom_cnn.pt").exists()
    assert (workplace / "results/custom_cnn/test.json").exists()


def test_a_stream_drops_what_it_cannot_write_and_escapes_what_it_cannot_encode():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = commandline.LastingStream(narrow)
    assert stream.write("猫.jpg ✓") == 7
    stream.flush()
    assert narrow.buffer.getvalue() == b"\\u732b.jpg \\u2713"
    narrow.close()
    free = os.dup(2)
    stream.write("more")  # as after its reader has gone
    stream.flush()
    os.close(free)
    assert os.dup(2) == free  # and no file is left open by trying
    os.close(free)


def test_main_in_a_thread_trains_and_leaves_the_signals_alone(run):
    before, done = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: done.append(run(*SMALL, "--limit", "64")))
    thread.start()
    thread.join(timeout=120)
    assert [result.code for result in done] == [0]
    assert signal.getsignal(signal.SIGINT) == before
    assert Path("checkpoints/custom_cnn.pt").exists()


def test_printed_commands_name_the_script_from_where_the_user_stands(tmp_path, monkeypatch):
    arguments = ["--pictures", "it's here"]
    monkeypatch.chdir(ROOT)
    assert commandline.typed("evaluate.py", arguments)[1:] == ["evaluate.py", *arguments]
    monkeypatch.chdir(tmp_path)
    words = commandline.typed("evaluate.py", arguments)
    assert words[1] == str(ROOT / "evaluate.py")
    assert shlex.split(commandline.quoted(words)) == words
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        assert commandline.quoted(words).endswith('--pictures "it\'s here"')


def test_names_from_outside_reach_the_terminal_on_one_line_without_escape_sequences():
    assert printable("a\tb\n\x1b[31m\u202ec\x00") == "a b \\x1b[31m\\u202ec\\x00"
    assert printable("\udcff") == "\\udcff"
    assert printable("猫 é") == "猫 é"
    assert printable(" \n") == "' \\n'"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_what_a_run_writes_is_ignored_by_git_and_what_comes_with_the_clone_is_not():
    written = "checkpoints/custom_cnn.pt", "checkpoints/a.resume.pt", "data/cifar10.npz"
    written += "results/custom_cnn/config.json", "results/README.md", "results/index.html"
    brought = "checkpoints/custom_cnn-modern.pt", "results/reference/README.md", "data.py"
    git = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *written, *brought]
    done = subprocess.run(git, capture_output=True, text=True)
    assert done.stdout.split() == list(written)
