"""report.html: one file, only our own script, nothing from the network, everything escaped, drawn from whatever is there."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train.pages.comparison import write_comparison
from dist_train.pages.figures import (
    Boundary,
    Confusion,
    Example,
    Regression,
    boundary_gif,
    picture_png,
    write_boundary,
)
from dist_train.pages.report import write_report

EVIL = '<script>alert("1")</script>&\u6570'
NAME = "lr=0.1 <b>&{x}"  # what a folder may be called


class Page(HTMLParser):
    """Collects tags, sources, links and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.charts: list[dict[str, Any]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.charts += [json.loads(value or "") for name, value in attrs if name == "data-chart"]
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def make_run(root: Path, seed: int = 0, evil: str = "x") -> Path:
    root.mkdir(parents=True)
    rows = [
        {"time": "2026-01-01T00:00:00.000Z", "step": s, "epoch": 1, "samples": s, "split": "train", "loss": 2 / s,
         "lr": 0.1, "samples_per_s": 1000.0, "data_wait": 0.25, evil: 1.0}
        for s in range(1, 30)
    ]  # fmt: skip
    rows += [{"step": 29, "epoch": 1, "samples": 29, "split": "val", "loss": 0.5, "accuracy": 0.9, evil: None}]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"val": {"loss": 0.5, "accuracy": 0.9}, "test": {"accuracy": 0.875, evil: 1.0}}
    result = {
        "state": "completed",
        "step": 29,
        "epoch": 1,
        "metrics": metrics,
        "world_size": 2,
        "seconds": 61.0,
        evil: evil,
    }
    (root / "result.json").write_text(json.dumps(result))
    (root / "status.json").write_text(json.dumps({"state": "failed", "error": f"it broke: {evil}"}))
    (root / "attempts.jsonl").write_text(
        json.dumps({"time": "2026-01-01T00:00:00Z", "event": "start", "cause": evil}) + "\n{to"
    )
    (root / "config.yaml").write_text(f"seed: {seed}\nmodel: {{hidden: [8, {seed}]}}\n# {evil}\n")
    return root


def pictures(evil: str) -> list[Confusion | Regression | Boundary]:
    grid = np.indices((6, 8))[0] > 2
    worst = [Example(3, evil, "b", 0.97, np.zeros((8, 8))), Example(4, "a", "b", 0.9, None)]
    return [
        Confusion(np.array([[3, 1], [0, 2]]), [evil, "b"], worst),
        Regression(np.arange(5.0), np.arange(5.0) * 1.1, evil),
        Boundary(np.zeros((3, 2)), np.array([0, 1, 1]), (-1, 1, -1, 1), [(0, grid), (5, ~grid)]),
    ]


def test_a_report_shows_everything_and_runs_nothing(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / NAME, evil=EVIL), pictures=pictures(EVIL), environment={EVIL: EVIL})
    page = Page(path)
    assert "b" in page.tags  # our own; the name's stays text
    text = path.read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in policy
    assert page.tags.count("script") == 1
    assert NAME in page.text
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    for shown in (
        "completed",
        "0.8750",
        "1,000",
        "the whole config.yaml",
        "25%",
        "it broke",
        "Confusion matrix",
        "Most wrong",
        "taken for b",
    ):
        assert shown in page.text
    for title in ("Curves", "Predicted against true", "Decision boundary", "Starts and ends", "Config", "Environment"):
        assert title in page.text
    assert page.text.count(EVIL) >= 6
    assert "seed: 0" in page.text
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    assert '<div class="tile failed"><span>state</span>' in path.read_text(), "it was completed, and went on"


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path: Path) -> None:
    assert "unknown" in Page(write_report(tmp_path)).text
    (tmp_path / "status.json").write_text('{"state": "running", "step": 0, "epoch": 0}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "samples": 1, "split": "train", "loss": null}\n')
    page = Page(write_report(tmp_path))
    assert "running" in page.text
    (tmp_path / ".lease").mkdir()  # nobody's: it was killed
    assert '<div class="tile dead"><span>state</span><b>dead</b>' in write_report(tmp_path).read_text()
    assert "Curves" in page.text
    assert "Confusion" not in page.text


def test_many_classes_and_values_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    many = Confusion(np.eye(120, dtype=int), [f"class {i}" for i in range(120)])
    broken = Regression(np.array([1.0, math.nan]), np.array([math.inf, 2.0]))
    empty = Regression(np.array([]), np.array([]))
    path = write_report(tmp_path, pictures=[many, broken, empty, Confusion(np.zeros((2, 2), int))])
    page = Page(path)
    assert (page.tags.count("img"), page.tags.count("image")) == (2, 2)


def test_runs_are_laid_over_each_other_in_a_table_that_marks_the_best_and_names_differing_keys(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / NAME, 0), make_run(tmp_path / "b" / "other", 7)
    rows = (second / "metrics.jsonl").read_text().replace('"accuracy": 0.9', '"accuracy": 0.95')
    (second / "metrics.jsonl").write_text(rows)
    path = write_comparison([first, second], tmp_path / "compare.html")
    page, text = Page(path), html.unescape(path.read_text())
    assert NAME in page.text
    assert [line["name"] for line in page.charts[1]["lines"]] == [NAME, "other"]
    assert '<td data-value="0.9" title="at step 29">0.9000</td>' in text
    assert '<td class="best" data-value="0.95" title="at step 29">0.9500</td>' in text
    assert {"seed", "model.hidden.1", "val accuracy", "7"} <= set(page.text.splitlines())
    assert "model.hidden.0" not in page.text
    (second / "metrics.jsonl").unlink()
    assert "No such" not in Page(write_comparison([first, second], path)).text
    other = make_run(tmp_path / "c" / NAME, 0)
    same = Page(write_comparison([first, other], tmp_path / "same.html"))
    assert "nowhere" in same.text
    assert str(first) in same.text  # runs of one name are told apart by their paths
    write_comparison([first, first], tmp_path / "same.html")


def test_environment_restarts_changed_keys_and_what_differs_from_the_defaults_are_shown(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    git = {"commit": "0123abcd", "branch": "main", "changed": ["net.py"]}
    start = {"event": "start", "attempt": 0, "host": "n1", "world_size": 4, "nodes": 2, "resumed_from": 0}
    start |= {"command": "python -m dist_train.main", "git": git, "versions": {"torch": "2.11"}}
    again = {**start, "attempt": 1, "resumed_from": 12, "changed": ["optimizer.lr: 0.1 -> 0.05"]}
    (root / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (start, again)))
    (root / "config.yaml").write_text("seed: 0\ntrainer: {duration: 2ep, log_every: 50step}\noptimizer: {lr: 0.05}\n")
    text = html.unescape(write_report(root).read_text())
    order = [text.index(f"<h2>{title}") for title in ("Environment", "Curves", "Best and last", "Config: what differs")]
    assert order == sorted(order)
    for shown in (
        "python -m dist_train.main",
        "0123abcd (main), with changes that aren't committed in net.py",
        "4 processes on 2 nodes",
    ):
        assert shown in text
    marks = re.findall(r"<title>start 1: resumed from step 12; optimizer.lr: 0.1 -> 0.05</title>", text)
    assert len(marks) == text.count('<figure class="chart"') == 6
    ours, _, whole = text.partition("<h2>Config")[2].partition("<details>")
    assert "lr: 0.05" in ours
    assert ("seed" in ours, "log_every" in ours) == (False, False)  # as by default
    assert "log_every: 50step" in whole


def test_each_chart_has_train_and_val_and_their_best_and_shares_reach_to_100_percent(tmp_path: Path) -> None:
    page = Page(path := write_report(make_run(tmp_path / "run")))
    loss, share = page.charts[0], page.charts[-1]
    assert [line["name"] for line in loss["lines"]] == ["train", "val"]
    assert loss["lines"][0]["points"][1][:2] == [2.0, 1.0]
    assert (share["share"], share["low"], share["high"]) == (True, 0.0, 1.0)
    assert "best val: 0.9000 at step 29" in page.text
    assert 'aria-label="accuracy; best val 0.9000 at step 29"' in path.read_text()


def test_without_a_checkpoint_a_report_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    code = "import sys; from dist_train.main import main; code = main(['report', sys.argv[1]]); "
    code += "print(code, [name for name in ('matplotlib', 'torch', 'numpy') if name in sys.modules])"
    root = make_run(tmp_path / "run")
    done = subprocess.run([sys.executable, "-P", "-c", code, str(root)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{root / 'report.html'}\n0 []\n"
    assert "holds no checkpoint" in done.stderr
    assert (root / "curves.png").exists()


def test_the_boundary_moves_in_a_gif_and_stands_in_pngs(tmp_path: Path) -> None:
    boundary = pictures("x")[2]
    assert isinstance(boundary, Boundary)
    write_boundary(boundary, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["boundary-00000000.png", "boundary-00000005.png", "boundary.gif"]
    gif = Image.open(tmp_path / "boundary.gif")
    assert gif.n_frames == 2  # type: ignore[attr-defined]
    assert gif.size == Image.open(tmp_path / names[0]).size
    assert (tmp_path / "boundary.gif").read_bytes() == boundary_gif(boundary)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (300, 200, 3)])
def test_sample_pictures_are_enlarged_without_smoothing(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    array[0, 0] = 2.0  # beyond 1: clipped
    image = Image.open(io.BytesIO(picture_png(array)))
    assert 100 <= max(image.size) <= 224
    if shape[0] == 8:
        assert image.size == (112, 112)
        assert {color for _, color in image.convert("RGB").getcolors()} == {(0, 0, 0), (255, 255, 255)}


PROBE = """
const loss = document.querySelector(".chart svg"), box = loss.getBoundingClientRect(), out = document.createElement("pre");
const at = 42 + 282 / 2;  // the middle of the plot
loss.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * at / 340, clientY: box.top + 50}));
const captions = [...document.querySelectorAll(".chart figcaption")].map(e => e.textContent);
const smoothing = document.querySelector("#smoothing"), before = loss.querySelector(".smooth").getAttribute("d");
smoothing.value = "0.9"; smoothing.dispatchEvent(new Event("input"));
document.querySelector("#epochs").click();
const shown = name => getComputedStyle(loss.querySelector(name)).display;
out.id = "probe";
out.textContent = JSON.stringify({captions, hidden: smoothing.closest("span").hidden, before,
  smooth: loss.querySelector(".smooth").getAttribute("d"), units: [shown(".by-step"), shown(".by-epoch")]});
document.body.append(out);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_chromium_the_page_shows_values_under_the_pointer_smooths_and_counts_epochs(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", evil=EVIL), pictures=pictures(EVIL))
    ours = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = path.read_text().replace("script-src ", f"script-src 'sha256-{ours}' ")
    path.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/c",
    ]
    command = ["chromium", *options, "--window-size=390,800", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    probe = json.loads(html.unescape(found))
    assert probe["captions"][0].startswith("loss step 15 (epoch 0.52)train 0.1333 val 0.5000 at 29")  # 2 / 15
    assert "25.0%" in probe["captions"][-1]
    assert (probe["hidden"], probe["before"], probe["units"]) == (False, "", ["none", "inline"])
    mean, drawn = 0.0, re.findall(r"[ML]([\d.]+) ([\d.]+)", probe["smooth"])
    for step in range(1, 30):  # a mean that forgets, without the bias of its beginning
        mean = 0.9 * mean + 0.1 * 2 / step
    chart = Page(path).charts[0]
    height = (mean / (1 - 0.9**29) - chart["low"]) / (chart["high"] - chart["low"])
    assert float(drawn[-1][1]) == pytest.approx(14 + (1 - height) * 172, abs=0.1)
    assert len(drawn) == 29
