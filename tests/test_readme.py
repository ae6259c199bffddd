"""What README tells people to type: its commands run, and its changes to the code work."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torchvision
from conftest import PIPED, ROOT, command
from PIL import Image

import finetune
from sources import imagenet
from sources.cifar10 import CLASSES

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended, so that each takes a second or two: of a flag that is given twice the last one counts.
FEW = ("--limit", "40", "--epochs", "1", "--batch-size", "20", "--precision", "fp32")


@pytest.fixture
def clone(run, sample, monkeypatch):
    """`run` in a folder like a fresh clone, with photos of one's own in it."""
    shutil.copytree(ROOT / "tests/samples", "tests/samples")
    Path("checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints/custom_cnn-modern.pt", "checkpoints")
    for number, label in enumerate(sample["train_labels"][:200]):
        path = Path("photos", CLASSES[label], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample["train_images"][number]).save(path)

    def random_weights(arch):
        return torchvision.models.get_model(arch).state_dict(), {"source": "random"}

    monkeypatch.setattr(imagenet, "imagenet_weights", random_weights)
    return run


def test_every_command_runs(clone):
    joined = re.sub(r"\\\n\s+", "", README)
    blocks = [line for line in joined.splitlines() if line.startswith("    ")]
    typed = "\n".join([*blocks, *re.findall(r"`(python [^`]+)`", joined)]).replace("$s", "3")
    found = re.findall(r"\b(train_custom|finetune|evaluate)\.py((?: +[^\s#;&|]+)*)", typed)
    found = [(script, *shlex.split(flags)) for script, flags in found if ".py" not in flags]
    assert len(found) > 9
    for words in dict.fromkeys(found):
        if "--help" not in words:
            few = () if words[0] == "evaluate" else FEW
            assert clone(*words, *few).code == 0, words


def test_flags_of_tables_are_flags():
    rows = re.findall(r"^\| \S+ \| `(?:finetune.py )?(--[^`]+)`", README, re.MULTILINE)
    assert len(rows) > 3
    for flags in rows:
        finetune.parse(shlex.split(flags))


def replaced(text: str, change: list[str]) -> str:
    """Puts a change's lines with "+" in the place of those with "-", between those with neither."""
    old, new = ("".join(line[1:] for line in change if line[0] in signs) for signs in (" -", " +"))
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_changes_to_the_code_work(workplace):
    changed = workplace / "changed"
    keep = shutil.ignore_patterns(".*", "data", "results", "checkpoints", "tests", "__pycache__")
    shutil.copytree(ROOT, changed, ignore=keep)
    blocks = re.findall(r"```diff\n(.+?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for place, change in re.findall(
        r"^(\S+\.py), .+\n((?:[ +-].*\n)+)", "".join(blocks), re.MULTILINE
    ):
        path = changed / place
        path.write_text(replaced(path.read_text(), change.splitlines(keepends=True)))
    for words in (
        ("train_custom", "--recipe", "classic", "--optimizer", "amsgrad", "--brightness", "0.3"),
        ("finetune", "--arch", "resnet34", "--weights", "none", "--image-size", "32"),
    ):
        code = [word.replace(repr(str(ROOT)), repr(str(changed))) for word in command(*words, *FEW)]
        done = subprocess.run(code, cwd=workplace, **PIPED)
        assert done.returncode == 0, done.stderr
    assert "amsgrad" in Path("results/custom_cnn/config.json").read_text()
