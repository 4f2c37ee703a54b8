"""The files beside a run's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from runs import ROOT

from dist_train.runtime.sidefiles import SideFileError, read_mapping
from dist_train.runtime.storage import open_storage

TRICKY = "a: 1e-3\nb: 1.0e-3\nc: 0o17\nd: 1_000\ne: yes\nf: ~\ng: '1'\nh: 2026-01-01\ni: .inf\nj: &x [1, {k: *y}]\n"


def test_libyaml_reads_what_python_reads(tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    for text in [*texts, TRICKY.replace("*y", "~"), "t: 'a\U0001f600b'\n", "n:\n- - - 1\n", "a: 1\na: 2\n"]:
        (tmp_path / "config.yaml").write_text(text)
        found = read_mapping(open_storage(tmp_path), "config.yaml")
        assert repr(found) == repr(yaml.safe_load(text))
    (tmp_path / "config.yaml").write_text(TRICKY)  # an alias of nothing
    with pytest.raises(SideFileError, match="found undefined alias"):
        read_mapping(open_storage(tmp_path), "config.yaml")


@pytest.mark.parametrize("mark", ["[", "- ", "? "])
def test_what_nests_too_deeply_is_an_error_and_no_crash(tmp_path: Path, mark: str) -> None:
    (tmp_path / "config.yaml").write_text(mark * 30_000)
    with pytest.raises(SideFileError, match="not YAML"):
        read_mapping(open_storage(tmp_path), "config.yaml")
