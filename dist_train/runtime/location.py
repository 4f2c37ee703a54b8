"""Where a run lives: the path or URL that its config names, and whether a run can be written there."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import ConfigError
from dist_train.config.fields import PLACEHOLDER
from dist_train.runtime.storage import LocalStorage, Storage, open_storage

if TYPE_CHECKING:
    from dist_train.config.schema import Config

MICRO_BATCHES = "micro_batches.json"  # the micro-batch size that fits, once memory has run out
_APPENDED = ("metrics.jsonl", "attempts.jsonl")
FILES = ("config.yaml", "status.json", "result.json", "model.pt", "metrics.csv", MICRO_BATCHES, *_APPENDED)
FOLDERS = (".lease", "checkpoints", "logs", "trace", "digest")
_LONGEST = 100  # characters of a path inside a run's directory


def expand_name(template: str, config: Config, *, time: str, job: str) -> str:
    """Fill in `{time}`, `{job}` and keys like `{optimizer.lr}`; what isn't safe in a path becomes `-`.

    Different values give different names: a text that loses characters gets a few digits of its hash appended.
    Raises KeyError for a key that the config hasn't (`load_config` refuses such a name).
    """

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        given = {"time": time, "job": job}.get(key)
        value: Any = config.get(key) if given is None else given
        if isinstance(value, str) and key.endswith("_target_"):
            value = value.rpartition(".")[2]
        if value and isinstance(value, list) and all(type(item) in (int, float) for item in value):
            value = "-".join(map(str, value))
        text = str(value)
        safe = re.sub(r"[^\w.=+-]+", "-", text)
        safe = safe if text[:1] == "-" and text == safe else safe.strip("-.")
        if given is not None or (safe and safe == text):
            return safe or "none"
        return f"{safe or 'none'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

    return PLACEHOLDER.sub(fill, template)


def job_id() -> str | None:
    """The scheduler's or launcher's name for this job, the same after a requeue or restart; None for a plain process.

    An interactive shell inside an allocation (salloc, srun --pty) is no job: nothing restarts what was started there.
    """
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    run_id = env.get("TORCHELASTIC_RUN_ID", "none")
    job = None if _in_a_shell(env) else env.get("SLURM_JOB_ID")
    return job or (run_id if run_id != "none" else None)


def _in_a_shell(env: Mapping[str, str]) -> bool:
    """Whether a person started this in an interactive shell under Slurm (sbatch sets ENVIRONMENT=BATCH for its script)."""
    if env.get("ENVIRONMENT") == "BATCH":
        return False
    interactive = "SLURM_PTY_PORT" in env or env.get("SLURM_JOB_NAME") in ("interactive", "bash", "sh", "zsh", "fish")
    return interactive or (sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty())


def run_location(config: Config) -> str:
    """Path or URL of the config's run. `{time}` and `{job}` in its name are those of the job's first start.

    They are stored in `.jobs/` below `run.dir`, so that restarts and requeues of one job find their run again, and two
    jobs that start in the same second get different names.
    """
    template, place = config.run.name or "run", config.run.place
    job = job_id()
    jobs, label = open_storage(place).sub(".jobs"), job or str(os.getpid())
    stamp = ""
    if "{time}" in template:
        check_place(place)
        with contextlib.suppress(FileNotFoundError):
            stamp = jobs.read_bytes(job).decode() if job is not None else ""
        jobs.makedirs()
        stamp = stamp or _new_stamp(jobs, lambda time: expand_name(template, config, time=time, job=label))
        if job is not None:
            jobs.create_exclusive(job, stamp.encode())
            stamp = jobs.read_bytes(job).decode()
    return f"{place.rstrip('/')}/{expand_name(template, config, time=stamp, job=label)}"


def _new_stamp(jobs: Storage, name: Callable[[str], str]) -> str:
    """The current time, with a number appended if another start has taken that name."""
    now, token = datetime.now().strftime("%Y%m%d-%H%M%S"), secrets.token_bytes(8)
    stamps = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(stamp for stamp in stamps if jobs.create_exclusive("name-" + name(stamp).replace("/", "%"), token))


def check_place(location: str) -> None:
    """Check, writing nothing, whether a run can be written there; raises ConfigError that names the obstacle."""
    storage = open_storage(location)
    if obstacle := _obstacle(storage.path()) if isinstance(storage, LocalStorage) else "":
        raise no_place(location, obstacle)


def no_place(location: str, obstacle: str) -> ConfigError:
    """The error that a run can't be written there."""
    hint = "give run.dir a directory that this process can write to"
    return ConfigError.single("run.dir", f"{location} can't hold a run: {obstacle}; {hint}")


def _obstacle(root: Path) -> str:
    try:
        os.lstat(root)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a directory that can't be entered, a loop of links
        return f"{error.strerror} ({str(root)[:200]})"
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    longest = max(len(os.fsencode(part)) for part in root.parts)
    if longest > 255 or len(os.fsencode(root)) + _LONGEST > 4095:
        return f"the path is too long ({str(root)[:200]})"
    required = [there, *(root / name for name in FOLDERS)]
    for path in required:
        if os.path.lexists(path) and not path.is_dir():
            return f"{path} is {'a link to nothing' if not path.exists() else 'no directory'}"
    for path in (root / name for name in FILES):
        if os.path.lexists(path) and not path.is_file():
            return f"{path} is no file"
    for path in (*required, *(root / name for name in _APPENDED)):
        if path.exists() and not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
            return f"{path} can't be written (its permissions, or a read-only file system)"
    return ""
