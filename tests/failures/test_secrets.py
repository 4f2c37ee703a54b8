"""Secrets that lie about (the environment, a URL, an exception's message) are in nothing that a run writes or says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import start
from test_failures import CONFIG

from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.config.secrets import mask
from dist_train.runtime.storage import Storage

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
    ],
)
def test_a_secret_in_the_config_is_refused_with_the_cure_and_not_repeated(
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


def test_a_place_on_the_command_line_with_a_password_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"s3://\*\*\*@bucket holds a secret"):
        Storage("s3://key:planted@bucket")


def test_a_weak_password_that_is_part_of_a_path_is_masked_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "postgres")
    assert mask("/home/postgres/runs") == "/home/***/runs"
    assert Storage(tmp_path / "postgres").list() == []


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/a:b@c", "sftp://user@host/runs", "https://host/x?page=3&monkey=1", "C:\\runs", "12:30@noon"),
        *("runs/token", "pad_token: <pad>", "file.py:3: in f", "a=1&b=2"),
    ],
)
def test_what_only_resembles_a_secret_stays(text: str) -> None:
    assert mask(text) == text
