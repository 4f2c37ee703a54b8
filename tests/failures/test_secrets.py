"""Secrets that lie about (the environment, a URL, an exception's message) are in nothing that a run writes or says."""

from __future__ import annotations

import html
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing import CONFIG
from runs import start

from dist_train.config.errors import ConfigError, describe, mask, visible
from dist_train.config.load import load_config
from dist_train.pages.figures import Confusion, Example
from dist_train.pages.report import write_report
from dist_train.runtime.storage import open_storage
from dist_train.tracking.console import Console
from dist_train.tracking.logs import setup_logging
from dist_train.watch.failure import describe as describe_failure
from dist_train.watch.failure import one_line

PLANTED = {
    "SERVICE_TOKEN": "pl4nted-4c1d-token",
    "AWS_SECRET_ACCESS_KEY": "pl4nted/7f+secret",
    "WANDB_API_KEY": "pl4nted0123456789abcdef0123456789abcdef00",
    "PASSWORD_OF_NOBODY": "pl4nted-5b2e-password",
}


def test_what_is_planted_is_nowhere_in_a_runs_directory_nor_on_the_terminal(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "faulty.py", tmp_path)
    (tmp_path / "faulty.yaml").write_text(
        CONFIG.replace("{tensorboard: false}", "{wandb: {project: p, mode: offline}}")
    )
    process = start(
        *(tmp_path, 1, "--config", "faulty.yaml", "checkpoint.every=5step"),
        env={"FAIL": "leak@0", "WANDB_DIR": str(tmp_path), **PLANTED},
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    place = tmp_path / "runs/run"
    assert "https://***@host/x?X-Amz-Signature=*** denied (***)" in err
    assert (
        "https://***@host/x?X-Amz-Signature=*** denied (***)"
        in json.loads((place / "status.json").read_text())["error"]
    )
    assert "a warning with ***" in (place / "logs/rank-0.log").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "faulty.py"]
    names = {path.name for path in files}
    assert {"manifest.json", "config.yaml", "attempts.jsonl", "metrics.jsonl", "wandb.log"} <= names
    for kind in ("events.out", ".wandb"):
        assert any(kind in name for name in names)
    written = {str(path): path.read_bytes() for path in files} | {"terminal": (out + err).encode()}
    assert not [name for name, content in written.items() if b"pl4nted" in content]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.dir", "s3://key:planted@bucket/runs"),
        ("run.dir", "https://planted@host/runs"),
        ("transfer.weights", "https://host/w.pt?X-Amz-Credential=a&X-Amz-Signature=planted"),
        ("model.token", "planted"),
        ("data.train.api_key", "planted"),
        ("tracking.wandb", {"secret": "planted"}),
        ("model.name", PLANTED["SERVICE_TOKEN"]),
        ("model.password", 73190),
        ("model.api_keys", ["planted", "b"]),
        ("model.options", {"deep": [{"clientSecret": {"value": "planted"}}]}),
        ("model.hosts", {"https://planted@host": 1}),
    ],
)
def test_a_secret_in_the_config_is_refused_with_the_fix_and_not_repeated(
    key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"{key}={json.dumps(value)}"])
    text = str(error.value)
    assert key in text
    assert "os.environ" in text
    assert "planted" not in text


def test_a_secret_is_masked_before_a_text_is_cut_or_quoted_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "pl4nted'\"\\n  \u00e9" + "x" * 40
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    quoted = (secret, repr(secret), json.dumps(secret), html.escape(secret))
    said = [
        *map(mask, quoted),
        describe(secret + "z" * 100),
        describe("y" * 20 + f"https://user:{'pl4nted' * 9}@host"),
        one_line(ValueError("y" * 950 + secret)),
        one_line(ValueError(f"a\n  b {secret}")),
        "".join(line for _, line in [("", text) for text in wrapped(secret)]),
    ]
    assert not [text for text in said if "pl4nted" in text or "xxxx" in text]


def wrapped(secret: str) -> list[str]:
    out = io.StringIO()
    console = Console(True, out=out, err=out)
    console.start_block([("run", "w " * 45 + secret)])
    console.close()
    return out.getvalue().splitlines()


def test_what_a_terminal_would_obey_is_shown_as_an_escape(tmp_path: Path) -> None:
    bad = "a\x1b[2Jb\udcff\r\u202e"
    shown = r"a\x1b[2Jb\udcff\r\u202e"
    out = io.StringIO()
    console = Console(True, out=out, err=out)
    setup_logging(tmp_path / "log", 0)
    console.note(bad)
    console.warn(bad)
    console.close()
    for text in (out.getvalue(), (tmp_path / "log").read_text()):
        assert text.count(shown) == 2
        assert "\x1b" not in text
    record = describe_failure(ValueError(bad))
    assert record["error"] == f"ValueError: {shown.replace(chr(92) + 'r', ' ')}"
    assert "\x1b" not in record["details"]
    assert shown in str(ConfigError.single("model", bad))
    assert visible("a\nb\tc", keep="") == r"a\nb\tc"
    (tmp_path / "status.json").write_text(json.dumps({"error": bad}))
    page = write_report(tmp_path, pictures=[Confusion(np.eye(2, dtype=int), [bad, "b"], [Example(0, bad, "b", 0.5)])])
    assert "\x1b" not in page.read_text()
    assert page.read_text().count(shown) >= 2


def test_a_place_on_the_command_line_with_a_password_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"s3://\*\*\*@bucket holds a secret"):
        open_storage("s3://key:planted@bucket")


def test_a_weak_password_that_is_part_of_a_path_is_masked_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "postgres")
    assert mask("/home/postgres/runs") == "/home/***/runs"
    assert open_storage(tmp_path / "postgres").list() == []


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/a:b@c", "sftp://user@host/runs", "https://host/x?page=3&monkey=1", "C:\\runs", "12:30@noon"),
        *("runs/token", "pad_token: <pad>", "file.py:3: in f", "a=1&b=2"),
    ],
)
def test_what_only_resembles_a_secret_stays(text: str) -> None:
    assert mask(text) == text
