import re
from html.parser import HTMLParser

import pytest

from display import pages
from display.live import Live
from reports import evaluation

EVIL = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>&\x1b[31m\udcff"
VOID = {"meta", "img", "line", "circle", "polyline"}
ROW = {"epoch": 1, "step": 10, "lr": 0.1, "train_loss": 1.5, "train_accuracy": 0.4}
VALIDATED = ROW | {"val_loss": 1.2, "val_accuracy": 0.5}
SCORES = {"precision": 0.5, "recall": None, "f1": 0.0}
REPORT = {
    "n": 60,
    "top1": 0.9387,
    "top1_tta": None,
    "tta": "none",
    "temperature": 1.5,
    "by_class": {"cat": {"images": 7, **SCORES}, EVIL: SCORES},
    "macro": SCORES,
}
CONTENT = {
    "name": "a_run",
    "command": "python train_custom.py --epochs 3",
    "status": "running",
    "updated": 1_800_000_000.5,
    "step": 15,
    "num_steps": 30,
}
RUN = {
    "run": "a_run",
    "network": "custom_cnn",
    "recipe": "modern",
    "weights": "none",
    "epochs": 3,
    "top1": 0.9,
    "top1_tta": 0.91,
    "tta": "crops",
    "num_test": 10_000,
    "parameters": 10,
    "seconds": 90.0,
    "hardware": "2 cores",
    "seed": 0,
    "date": "2025-01-01",
    "limit": None,
}


class Reader(HTMLParser):
    """Gathers a page's tags and texts, and insists that tags are closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if text.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(text.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def points(self):
        """The coordinates of all lines; each is a number within the plot."""
        lines = [re.split("[ ,]", line["points"]) for line in self.all("polyline")]
        assert all(0 <= float(value) <= 100 for line in lines for value in line)
        return [len(line) // 2 - 1 for line in lines]  # the last stands twice


def written(folder, **content):
    pages.write(folder, CONTENT | content)
    return Reader(folder / "index.html")


@pytest.mark.parametrize(
    ("status", "updated"), [("running", "1800000000"), ("stopped", "0"), ("finished", "0")]
)
def test_the_page_loads_itself_again_only_while_the_run_lives(tmp_path, status, updated):
    source = written(tmp_path, status=status, note="how to go on").source
    assert f"const updated = {updated}," in source
    assert "how to go on" in source
    assert source.count("location.reload") == 1
    assert "if (updated && quiet < 900) setTimeout(() => location.reload()" in source


@pytest.mark.parametrize(
    ("rounds", "done", "marks"), [(1, 6, 0), (None, 6, 0), (3, 1, 0), (3, 4, 1), (3, 6, 2)]
)
def test_charts_mark_where_a_training_begins_again(tmp_path, rounds, done, marks):
    config = {"epochs": 6, "rounds": rounds}
    history = [VALIDATED | {"epoch": epoch, "step": 10 * epoch} for epoch in range(1, done + 1)]
    reader = written(tmp_path, config=config, history=history)
    drawn = [line for line in reader.all("line") if line.get("class") == "again"]
    assert len(drawn) == 3 * marks  # of each chart
    assert reader.texts.count("⋮ begins again") == (3 if marks else 0)
    assert all(0 < float(line["x1"][:-1]) <= 100 for line in drawn)


def test_nothing_comes_from_elsewhere_and_pictures_that_are_not_there_are_left_out(tmp_path):
    (tmp_path / "batch.png").write_bytes(b"PNG")
    (tmp_path / "mistakes.png").write_bytes(b"PNG")
    pages.write_index(tmp_path / "..", [RUN | {"run": tmp_path.name}])
    own = written(tmp_path, status="finished", report=REPORT, history=[VALIDATED])
    index = Reader(tmp_path.parent / "index.html")
    assert [image["src"] for image in own.all("img")] == ["batch.png", "mistakes.png"]
    for reader, folder in ((own, tmp_path), (index, tmp_path.parent)):
        assert not re.search(r"https?:|//[a-z]|@import|url\(", reader.source)
        assert not [tag for tag in ("link", "iframe", "object", "base") if reader.all(tag)]
        assert not [script for script in reader.all("script") if script]
        for link in reader.all("a"):
            assert (folder / link["href"]).exists()
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize("key", ["name", "command", "note", "changed", "config"])
def test_text_from_outside_injects_no_markup(tmp_path, key):
    plain = written(tmp_path, report=REPORT, note="x", changed={"x": "x"}, config={"x": "x"})
    value = {EVIL: EVIL} if key in ("changed", "config") else EVIL
    more = {"note": "x", "changed": {"x": "x"}, "config": {"x": "x"}, key: value}
    evil = written(tmp_path, report=REPORT, **more)
    assert evil.tags == plain.tags
    assert "<script>alert" not in evil.source
    shown = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>&\\x1b[31m\\udcff"
    assert any(shown in text for text in evil.texts)


@pytest.mark.parametrize("key", ["run", "network", "recipe", "weights", "hardware"])
def test_the_index_of_a_foreign_folder_injects_no_markup(tmp_path, key):
    pages.write_index(tmp_path, [RUN])
    plain = Reader(tmp_path / "index.html")
    pages.write_index(tmp_path, [RUN | {key: EVIL}])
    evil = Reader(tmp_path / "index.html")
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert all(set(link) <= {"class", "href"} for link in evil.all("a"))
    if key == "run":
        assert {link["href"].isascii() and '"' not in link["href"] for link in evil.all("a")}
        pages.write_index(tmp_path, [RUN | {"run": "javascript:alert(1)"}])
        links = Reader(tmp_path / "index.html").all("a")
        assert {link["href"] for link in links} == {"javascript%3Aalert%281%29/index.html"}


def test_the_loss_is_drawn_by_step_before_the_first_epoch_has_ended(tmp_path):
    steps = [(step, 2.0 - step / 10, step / 100) for step in range(1, 6)]
    page_ = written(tmp_path, steps=steps)
    assert page_.points() == [5, 5]
    assert "Loss (nats) by step" in page_.texts
    assert "Learning rate by step" in page_.texts


@pytest.mark.parametrize("as_text", [False, True], ids=["numbers", "history.csv"])
def test_curves_hold_every_finite_number_of_the_history(tmp_path, as_text):
    history = [
        VALIDATED,
        VALIDATED | {"epoch": 2, "step": 20, "train_loss": float("nan"), "val_loss": None},
        ROW | {"epoch": 3, "step": 30, "val_accuracy": "", "lr": 0.0, "train_loss": 1e300},
    ]
    if as_text:
        history = [{k: "" if v is None else str(v) for k, v in row.items()} for row in history]
    steps = [(5, 2.0, 0.1), (15, float("inf"), 0.05), (30, None, 0.0)]
    # Loss by step, training and validation; accuracy in training and validation; rate.
    assert written(tmp_path, history=history, steps=steps).points() == [1, 1, 1, 3, 2, 3]
    assert "Loss (nats) by epoch" in written(tmp_path, history=history).texts


def test_a_page_without_any_number_is_still_a_page(tmp_path):
    assert written(tmp_path).points() == []
    assert written(tmp_path, history=[{"epoch": 1, "step": 1}], num_steps=None).points() == []
    for rows in ([], [RUN | dict.fromkeys(("seconds", "top1_tta", "hardware", "seed"))]):
        pages.write_index(tmp_path, rows)
        assert not Reader(tmp_path / "index.html").all("circle")


def test_the_end_shows_accuracies_scores_by_class_and_what_the_result_depends_on(tmp_path):
    facts = {
        "environment": {"hardware": "2 cores", "processes": 2},
        "revision": "abc1234",
        "start_weights": {"name": "IMAGENET1K_V1"},
        "config": {"lr": 0.1},
    }
    report = REPORT | {"top1_tta": 0.9477, "tta": "crops"}
    end = written(tmp_path, status="finished", report=report, train_seconds=2694.0, **facts)
    assert "test accuracy (%) of 60 images" in end.texts
    assert {"93.87", "94.77", "with TTA, crops (%)", "44.9", "2 cores", "2"} <= set(end.texts)
    assert {"abc1234", "name IMAGENET1K_V1", "lr 0.1", "processes"} <= set(end.texts)
    rows = end.source.split("<tbody>")[1].split("<tr>")[1:]
    assert "<td>cat</td><td></td><td>50.00</td><td>0.00</td><td>7</td>" in rows[0]
    assert rows[-1].startswith("<td>mean</td>")
    assert not end.all("progress")
    assert written(tmp_path).all("progress") == [{"value": "0.5"}]


@pytest.mark.parametrize(("temperature", "said"), [(None, True), (1.5, False)])
def test_a_network_without_a_temperature_is_said_not_to_be_calibrated(tmp_path, temperature, said):
    (tmp_path / "calibration.png").write_bytes(b"PNG")
    page = written(tmp_path, report=REPORT | {"temperature": temperature})
    assert any("Not calibrated" in text for text in page.texts) == said


def test_the_index_spreads_out_good_runs_beside_a_weak_one(tmp_path):
    accuracies = {"best": 0.96, "good": 0.92, "weak": 0.60, "perfect": 1.0}
    runs = [RUN | {"run": run, "top1": top1} for run, top1 in accuracies.items()]
    pages.write_index(tmp_path, runs)
    circles = Reader(tmp_path / "index.html").all("circle")
    best, good, weak, perfect = (float(circle["cy"].rstrip("%")) for circle in circles)
    assert 0 < perfect < best < good < weak < 100
    assert good - best > 10  # per cent of the plot's height


def test_the_index_has_a_point_and_a_row_for_each_run_and_marks_what_does_not_compare(tmp_path):
    more = [{"run": "b", "hardware": "a GPU"}, {"run": "c", "limit": 500}, {"run": "d"}]
    pages.write_index(tmp_path, [RUN, *(RUN | row for row in more)])
    index = Reader(tmp_path / "index.html")
    classes = [link["class"] for link in index.all("a") if "class" in link]
    assert classes == ["usual", "other", "other", "usual"]
    assert len(index.all("circle")) == 4
    assert len(index.all("tr")) == 5
    assert len(index.all("button")) == len(index.all("th")) == index.source.count("<td") / 4


def test_points_of_the_loss_do_not_mix_epochs():
    live = Live(None, {}, [], 12)
    live.refresh = lambda: None
    live.every = 4
    for step in range(1, 13):  # epochs of three steps; in each an image's loss is its number
        epoch, images = (step - 1) // 3, 32 * ((step - 1) % 3 + 1)
        live.note(epoch, step, 0.1, (epoch + 1) * images, images, 0)
    assert [(step, loss) for step, loss, _ in live.points] == [(4, 2), (8, 3), (12, 4)]


def test_a_class_called_like_the_mean_keeps_its_own_row():
    scores = {"precision": 0.25, "recall": 0.25, "f1": 0.25, "images": 3}
    named = {"cat": scores, "mean": scores, "macro average": scores}
    report = {"by_class": named, "macro": scores | {"recall": 0.75}}
    rows = [(row["name"], row["recall"]) for row in pages._scores(report)]
    shares = [("cat", "25.00"), ("mean", "25.00"), ("macro average", "25.00"), ("mean", "75.00")]
    assert rows == shares
    lines = evaluation.class_table(report).splitlines()[1:]
    names = [line.split("  ")[0].strip() for line in lines]
    assert names == ["cat", "mean", "macro average", "macro average"]
    assert "75.00" in lines[3]
