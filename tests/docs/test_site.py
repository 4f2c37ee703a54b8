"""Links of all pages lead somewhere: in the repository, as GitHub shows it, and in the site that MkDocs builds of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import ROOT

from dist_train.tracking.live import Beside, Position, Table, cells_of

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "bench").glob("*.md"),
        *(ROOT / "docker").glob("*.md"),
    ]
)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def targets(page: Path) -> list[str]:
    """What a page links to or shows, without other sites."""
    found = [a or b for a, b in LINK.findall(CODE.sub("`code`", page.read_text(encoding="utf-8")))]
    return [target for target in found if not re.match(r"https?://|mailto:", target)]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    wrong = []
    for target in targets(page):
        path, _, anchor = target.partition("#")
        there = Path(os.path.normpath(page.parent / path)) if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            wrong.append(target)
    return wrong


def test_every_link_of_the_repository_leads_to_a_file_and_a_heading(tmp_path: Path) -> None:
    assert len(PAGES) > 25
    assert {str(page.relative_to(ROOT)): wrong for page in PAGES if (wrong := broken(page))} == {}
    (tmp_path / "a.md").write_text("# One two\n[a](#one-two) [b](#three) [c](b.md) `[d](d.md)`\n")
    assert broken(tmp_path / "a.md") == ["#three", "b.md"]


@pytest.mark.parametrize("start", ["README.md", "docs/README.md"])
def test_every_page_is_reached(start: str) -> None:
    """From the README's or the index's own links, without passing by other pages."""
    linked = {os.path.normpath((ROOT / start).parent / target.partition("#")[0]) for target in targets(ROOT / start)}
    english = [page for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert [page.name for page in english if str(page) not in linked] == []
    chinese = {str((ROOT / "docs/zh" / target).resolve()) for target in targets(ROOT / "docs/zh/README.md")}
    assert [
        page.name for page in (ROOT / "docs/zh").glob("*.md") if page.name != "README.md" and str(page) not in chinese
    ] == []


class Html(HTMLParser):
    """The links of a page, the files that it needs, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.needs: set[str] = set()
        self.ids: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values["id"] or ""} if "id" in values else set()
        if tag == "a":
            self.links.add(values.get("href") or "")
        elif tag in ("img", "script", "link") and values.get("rel") != "canonical":
            self.needs.add(values.get("src") or values.get("href") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Html]:
    """The built site: its pages."""
    pytest.importorskip("material", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = {}
    for path in folder.rglob("*.html"):
        pages[path] = Html()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def test_every_link_of_the_site_leads_to_a_page_and_a_heading(site: dict[Path, Html]) -> None:
    wrong = []
    for page, html in site.items():
        for link in html.links | html.needs:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or page.name == "404.html":
                continue
            there = Path(os.path.normpath(page.parent / path)) if path else page
            if not there.exists() or (anchor and there in site and anchor not in site[there].ids | {"__skip"}):
                wrong.append((page.name, link))
    assert wrong == []
    names = {str(page.relative_to(ROOT / "docs").with_suffix(".html")) for page in (ROOT / "docs").rglob("*.md")}
    folder = next(page for page in site if page.name == "404.html").parent
    assert {str(page.relative_to(folder)) for page in site} >= {name.replace("README", "index") for name in names}


def test_code_is_shown_as_code(site: dict[Path, Html]) -> None:
    assert [page.name for page, html in site.items() if "```" in html.text] == []
    assert all("my_data.py" in html.text for page, html in site.items() if page.name == "your-own.html")


def test_the_site_needs_nothing_from_elsewhere_and_has_a_search_index(site: dict[Path, Html]) -> None:
    assert [need for html in site.values() for need in html.needs if re.match(r"(https?:)?//", need)] == []
    folder = next(page for page in site if page.name == "404.html").parent
    index = (folder / "search/search_index.json").read_text(encoding="utf-8")
    assert "trainer.micro_batch_size" in index
    assert "zh/troubleshooting.html" in index


def test_the_recording_shows_the_console_of_today() -> None:
    """docs/first-run.svg: its table is the one that the console prints; its last screen needs no animation."""
    root = ElementTree.parse(ROOT / "docs/first-run.svg").getroot()
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    shown = [" ".join(tspan.text or "" for tspan in text).split() for text in texts]
    recorded = next(line for line in shown if line[:2] == ["1/20", "19"])
    loss, val, accuracy, lr = map(float, recorded[2:6])
    beside = Beside(1, {"loss": loss}, {"lr": lr}, "accuracy", best=True)
    cells = cells_of(Position(lambda: 19, epoch=1, epochs=20), 19, {"loss": val, "accuracy": accuracy}, beside)
    head, row = Table().lines(cells, 80, best=True, color=False)
    assert head.split() in shown
    assert (row.split()[:6], row.split()[-1]) == (recorded[:6], recorded[-1])
    strip = next(part for part in root.iter() if part.get("id") == "strip")
    assert strip.get("transform", "").startswith("translate(0 -")
