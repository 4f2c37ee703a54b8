"""Hooks of MkDocs: links from docs/ to the rest of the repository lead somewhere in the site too.

What a page links to outside of docs/ becomes part of the site, under `repository/`: pages of Markdown as pages, a folder as a
list of its files, and everything else as the file itself. So the same links work on GitHub and in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = "repository/"
PAGES = ("bench/RESULTS.md", "bench/README.md", "docker/README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
# A link or a picture of Markdown, outside of code; its target without the anchor.
LINK = re.compile(r"(\]\()([^)\s#]+)(?=[)#])")
FENCE = re.compile(r"^(```\w+) (\S+)$", re.M)
CODE = re.compile(r"(^```.*?^```$|^    .*?$|`[^`\n]*`)", re.M | re.S)


def links(text: str) -> list[str]:
    """The relative targets in a page."""
    prose = CODE.sub("", text)
    return [found[1] for found in LINK.findall(prose) if "://" not in found[1] and not found[1].startswith("mailto:")]


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside of docs/, and what that links to."""
    todo = [
        (f"docs/{file.src_uri}", target)
        for file in files.documentation_pages()
        for target in links(file.content_string)
    ]
    todo += [("README.md", page) for page in PAGES]
    seen: set[str] = set()
    while todo:
        page, target = todo.pop()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path in seen or path.startswith("docs/") or not (ROOT / path).exists():
            continue
        seen.add(path)
        files.append(_file(config, path))
        if path.endswith(".md"):
            todo += [(path, target) for target in links((ROOT / path).read_text(encoding="utf-8"))]
    return files


def _file(config: Any, path: str) -> File:
    if not (ROOT / path).is_dir():
        return File.generated(config, OUTSIDE + path, abs_src_path=str(ROOT / path))
    names = sorted(item.name + "/" * item.is_dir() for item in (ROOT / path).iterdir() if item.name[0] not in "._")
    return File.generated(
        config, f"{OUTSIDE}{path}/index.md", content=f"# {path}/\n\n" + "".join(f"* `{n}`\n" for n in names)
    )


def _titled(match: re.Match[str]) -> str:
    """A fence with a file's name, which is its title in the site; `run` is for the tests."""
    return match[1] if match[2] == "run" else f'{match[1]} title="{match[2]}"'


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Links as the site has them."""
    here = page.file.src_uri
    source = here.removeprefix(OUTSIDE) if here.startswith(OUTSIDE) else f"docs/{here}"

    def found(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path
        uri = uri + "/index.md" if (ROOT / path).is_dir() and not path.startswith("docs/") else uri
        return match[1] + posixpath.relpath(uri, posixpath.dirname(here) or ".")

    markdown = re.sub(
        r"<(table|tr|td)>", r'<\1 markdown="block">', markdown
    )  # what stands in cells is Markdown, as on GitHub
    parts = CODE.split(FENCE.sub(_titled, markdown))
    return "".join(part if CODE.fullmatch(part) else LINK.sub(found, part) for part in parts)
