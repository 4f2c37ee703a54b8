"""Kills a process of a real run at a chosen point. Only tests put this directory on PYTHONPATH; the product has no hook.

Python imports this module at its start, in every process of the run. DIST_TRAIN_CHAOS says what is to die, and when:
{"point": ..., "step": at this step or the next chance after it, "rank": ..., "all": take torchrun and all ranks along,
"mark": a file that is written first, so that the test knows that it has happened}.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

SPEC = json.loads(os.environ.get("DIST_TRAIN_CHAOS", "null"))
RANK = int(os.environ.get("RANK", "0"))
now: dict[str, Any] = {"step": 0, "file": "", "writes": 0}


def at(point: str, step: int | None = None) -> bool:
    """Whether this process dies here."""
    return point == SPEC["point"] and SPEC["rank"] == RANK and (now["step"] if step is None else step) >= SPEC["step"]


def die() -> None:
    """SIGKILL, without a word: to this process, or to torchrun and all its ranks."""
    Path(SPEC["mark"]).write_text(f"pid {os.getpid()}")
    if SPEC["all"] and "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for pid in [launcher, *(int(child) for child in children if int(child) != os.getpid())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by `wrapper(it, *its arguments)`."""
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        return wrapper(real, *arguments, **keywords)

    setattr(owner, name, wrapped)


def after(point: str) -> Callable[..., Any]:
    """A wrapper that dies when the function is done."""

    def wrapper(real: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        value = real(*arguments, **keywords)
        if at(point):
            die()
        return value

    return wrapper


def inside(point: str, event: str, name: str, count: int) -> Callable[..., Any]:
    """A wrapper that dies at the `count`-th call of something called `name` inside the function ("" is anything)."""

    def wrapper(real: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        if not at(point):
            return real(*arguments, **keywords)
        left = count

        def profile(frame: Any, what: str, argument: Any) -> None:
            nonlocal left
            called = argument.__name__ if what == "c_call" else frame.f_code.co_name
            if what == event and name in called:
                left -= 1
                if left == 0:
                    die()

        sys.setprofile(profile)
        try:
            return real(*arguments, **keywords)
        finally:
            sys.setprofile(None)

    return wrapper


def in_trainer(module: ModuleType) -> None:
    """The step that training is at."""

    def run_step(real: Callable[..., Any], trainer: Any, work: Any) -> None:
        now["step"] = work.step + 1
        real(trainer, work)

    around(module.Trainer, "_run_step", run_step)  # type: ignore[attr-defined]


def in_step(module: ModuleType) -> None:
    """Death in a step, between its backward and its update."""
    around(module.Stepper, "_forward_backward", after("step"))  # type: ignore[attr-defined]


def in_storage(module: ModuleType) -> None:
    """Death in the middle of a file, in the middle of a deletion, between two files of a run's end."""
    state = threading.local()

    def write_stream(real: Callable[..., Any], storage: Any, name: str, produce: Any) -> Any:
        state.file, state.writes = name.rsplit("/", 1)[-1], 0
        return real(storage, name, produce)

    def write(real: Callable[..., Any], writer: Any, data: Any) -> int:
        state.writes = getattr(state, "writes", 0) + 1
        enough = 1 if getattr(state, "file", "") == "manifest.json" else 3
        if state.writes >= enough and at(f"writing {state.file}"):
            view = memoryview(data).cast("B")
            writer._sink.write(view[: len(view) // 2])
            writer._sink.flush()
            die()
        return real(writer, data)

    def delete(real: Callable[..., Any], storage: Any, name: str) -> None:
        if at("deletion") and name.startswith(".trash-"):
            sorted(storage.path(name).iterdir())[0].unlink()
            die()
        real(storage, name)

    def write_atomic(real: Callable[..., Any], storage: Any, name: str, data: bytes) -> None:
        real(storage, name, data)
        if at("end") and name == "model.pt":
            die()

    around(module.Storage, "write_stream", write_stream)  # type: ignore[attr-defined]
    around(module.HashingWriter, "write", write)  # type: ignore[attr-defined]
    around(module.Storage, "delete", delete)  # type: ignore[attr-defined]
    around(module.Storage, "write_atomic", write_atomic)  # type: ignore[attr-defined]


def in_publishing(module: ModuleType) -> None:
    """Death when all files are written and the manifest isn't; when it is published and nothing older is deleted."""

    def publish(real: Callable[..., Any], store: Any, writing: Any, *arguments: Any) -> None:
        if at("unpublished", writing.step):
            die()
        real(store, writing, *arguments)
        if at("published", writing.step):
            die()

    around(module.OwnedStore, "publish", publish)  # type: ignore[attr-defined]


def in_copying(module: ModuleType) -> None:
    """Death in the copy to host memory."""
    around(module.HostCopy, "take", inside("copy", "c_call", "", 40))  # type: ignore[attr-defined]


def in_evaluating(module: ModuleType) -> None:
    """Death in an evaluation."""
    around(module.Evaluator, "run", inside("evaluation", "call", "_batch", 2))  # type: ignore[attr-defined]


def in_starting(module: ModuleType) -> None:
    """Death between the first writes of a start and its first step."""
    around(module.RunDir, "claim_attempt", after("start"))  # type: ignore[attr-defined]


def in_reading(module: ModuleType) -> None:
    """Death of a loader worker, after so many batches."""

    def read(real: Callable[..., Any], dataset: Any, request: Any) -> Any:
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:
            now["step"] += 1
            if at("worker"):
                die()
        return real(dataset, request)

    around(module.SampleReader, "__getitems__", read)  # type: ignore[attr-defined]


PLACES = {
    "dist_train.training.trainer": in_trainer,
    "dist_train.step.step": in_step,
    "dist_train.runtime.objectstore": in_storage,
    "dist_train.checkpoint.publish": in_publishing,
    "dist_train.checkpoint.staging": in_copying,
    "dist_train.evaluation.evaluate": in_evaluating,
    "dist_train.runtime.rundir": in_starting,
    "dist_train.data.reading": in_reading,
}


class Finder(importlib.abc.MetaPathFinder):
    """Changes a module of PLACES once it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The ordinary spec, with a loader that does more."""
        if name not in PLACES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                PLACES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if SPEC is not None:
    sys.meta_path.insert(0, Finder())
