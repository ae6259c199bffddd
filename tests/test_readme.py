"""What README tells people to type: its commands run, and its changes to the code work."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from conftest import PIPED, ROOT, WARNINGS
from PIL import Image

import finetune
from sources import imagenet
from sources.cifar10 import CLASSES

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended, so that each takes a second or two: of a flag that is given twice the last one counts.
FEW = ("--limit", "40", "--epochs", "1", "--batch-size", "20", "--precision", "fp32")
PICTURES = ("batch", "calibration", "confusion_matrix", "curves", "first_layer", "mistakes")


def commands() -> list[tuple[str, ...]]:
    """The commands in README's blocks and sentences, each once: script and arguments."""
    text = re.sub(r"\\\n\s+", "", README)
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`(python [^`]+)`", text)
    typed = "\n".join(lines).replace("$s", "3")
    found = []
    for script, flags in re.findall(
        r"\b(train_custom|finetune|evaluate)\.py((?: +[^\s#;&|]+)*)", typed
    ):
        words = (script, *shlex.split(flags))
        if ".py" not in flags and "--help" not in words and words not in found:
            found.append(words)
    return found


@pytest.fixture
def clone(drawing, run, sample, monkeypatch):
    """`run` in a folder like a fresh clone, with photos of one's own in it."""
    shutil.copytree(ROOT / "tests/samples", "tests/samples")
    Path("checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints/custom_cnn-modern.pt", "checkpoints")
    for number, label in enumerate(sample["train_labels"][:200]):
        path = Path("photos", CLASSES[label], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample["train_images"][number]).save(path)

    def random_weights(arch, url):  # instead of a download
        return torchvision.models.get_model(arch).state_dict(), {"source": "random"}

    monkeypatch.setattr(imagenet, "imagenet_weights", random_weights)
    return run


def test_every_command_runs_without_a_warning(clone):
    found = commands()
    assert len(found) > 9
    for words in found:
        few = () if words[0] == "evaluate" else FEW
        done = clone(*words, *few)
        assert done.code == 0, (words, done)
        assert "warning" not in (done.out + done.err).lower(), (words, done)


def test_the_programs_run(clone, capsys):
    assert clone("finetune", "--arch", "resnet18", "--pictures", "photos", *FEW).code == 0
    for words in commands():
        if "--export" in words:
            assert clone(*words).code == 0
    programs = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    assert len(programs) == 3
    capsys.readouterr()
    for program in programs:
        exec(program, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["cat", "cat"]


def test_flags_of_tables_are_flags():
    rows = re.findall(r"^\| \S+ \| `(?:finetune.py )?(--[^`]+)`", README, re.MULTILINE)
    assert len(rows) > 3
    for flags in rows:
        finetune.parse(shlex.split(flags))


def apply(change: str, path: Path) -> None:
    """Puts a change's lines with "+" in the place of those with "-", between those with neither."""
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] != "+")
    new = "".join(line[1:] for line in lines if line[0] != "-")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def changed(workplace):
    """A copy of the code with all of README's changes."""
    folder = workplace / "changed"
    keep = shutil.ignore_patterns(".*", "data", "results", "checkpoints", "tests", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=keep)
    blocks = re.findall(r"```diff\n(.+?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        for place, change in re.findall(r"^(\S+\.py), .+\n((?:[ +-].*\n)+)", block, re.MULTILINE):
            apply(change, folder / place)
    return folder


def typed(code: Path, script: str, *arguments: str) -> str:
    """What a script of this code prints, in a process of its own, on the sample as CIFAR-10."""
    start = (
        "import sys; from pathlib import Path\n"
        f"sys.path[:0] = [{str(code)!r}, {str(ROOT / 'tests')!r}]\n"
        "import conftest; conftest.use_sample(Path('data'))\n"
        f"import {script}; sys.exit({script}.main(sys.argv[1:]))"
    )
    words = [sys.executable, *WARNINGS, "-c", start, *arguments]
    done = subprocess.run(words, **PIPED, timeout=300)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "warning" not in printed.lower(), printed
    return printed


def test_the_changes_to_the_code_train_draw_and_are_evaluated(changed):
    new = ("--optimizer", "amsgrad", "--contrast", "0.3", "--run-name", "tried")
    typed(changed, "train_custom", "--recipe", "classic", *new, *FEW)
    assert "amsgrad" in Path("results/tried/config.json").read_text()
    new = ("--arch", "resnet34", "--weights", "none", "--image-size", "32")
    typed(changed, "finetune", *new, *FEW)
    for name in PICTURES:
        assert Path(f"results/resnet34/{name}.png").exists(), name
    printed = typed(changed, "evaluate")  # both checkpoints: "tried" comes after "resnet34"
    assert printed.count("top-1 accuracy") == 2, printed
