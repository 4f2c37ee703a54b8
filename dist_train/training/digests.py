"""`debug.digest`: a digest of every step's loss sum, reduced gradient and weights, on every rank (see tracking/digests.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_train.files import StorageError
from dist_train.step.digest import TensorDigests, WatchedReducer, gradients
from dist_train.tracking.digests import FOLDER, DigestFile, cut_back, file_name, rank_of

if TYPE_CHECKING:
    from dist_train.objective.modules import Modules
    from dist_train.objective.objective import Objective, StepSums
    from dist_train.reduction.reduce import Reducer
    from dist_train.runtime.rundir import RunDir
    from dist_train.runtime.world import World

MAX_UNWRITTEN = 4096  # steps between two writes, each of which waits for the device


class _Writes(Protocol):
    def write(self, steps: list[tuple[int, np.ndarray]], *, sync: bool = False) -> None: ...
    def close(self) -> None: ...


class StepDigests:
    """Takes the digests of each step on the device, and writes them when it is asked to.

    Of a step it records the sums of its loss (and weight, and of each named loss) and the gradient of every parameter as they
    are right after the reduction: summed over all ranks, before unscaling, division and clipping; then the parameters and
    buffers that the next step begins with. Where an optimizer computes the gradient several times in a step (LBFGS), it is the
    first one.

    Args:
        modules: all parameters and buffers. optimizers: the names of several, each with a loss of its own; none for one.
        open_file: opens this rank's file for tensors of these names.
    """

    def __init__(self, modules: Modules, optimizers: Collection[str], open_file: Callable[[list[str]], _Writes]):
        self.modules = modules
        suffixes = [f" ({name})" for name in optimizers] or [""]
        parameters = [name for name, _ in modules.named_parameters()]
        names = [f"loss{suffix}" for suffix in suffixes]
        names += [f"gradient {name}{suffix}" for suffix in suffixes for name in parameters]
        names += [f"weight {name}" for name in parameters] + [f"buffer {slot.name}" for slot in modules.buffers_at]
        self._places = {name: place for place, name in enumerate(names)}
        self._file = open_file(list(self._places))
        self._digests = TensorDigests()
        self._open: list[tuple[list[int], Tensor]] = []  # of the step that runs: places of tensors, and their digests
        self._unwritten: list[tuple[int, list[tuple[list[int], Tensor]]]] = []

    def watched(
        self, new_reducer: Callable[[], Reducer], objective: Objective, optimizer: str = ""
    ) -> Callable[[], Reducer]:
        """Makes reducers as `new_reducer` does, whose results are recorded, for one of several optimizers by its name."""
        suffix = f" ({optimizer})" if optimizer else ""

        def make() -> Reducer:
            inner, trained = new_reducer(), objective.trained()

            def reduced(sums: StepSums) -> None:
                loss = f"loss{suffix}"
                if any(self._places[loss] in places for places, _ in self._open):
                    return
                weight = sums.weight
                if not isinstance(weight, torch.Tensor):
                    weight = torch.full((), weight, dtype=torch.float64, device=sums.loss.device)
                values = torch.stack([sums.loss.detach().double(), weight.double()])
                terms = [] if sums.terms is None else [sums.terms.reshape(-1)]
                found = {loss: torch.cat([values, *terms])}
                self._take(found | {f"gradient {name}{suffix}": g for name, g in gradients(trained).items()})

            return WatchedReducer(inner, reduced)

        return make

    def take(self, step: int) -> None:
        """The step (from 1) is done: the weights that the next one begins with."""
        found: dict[str, Tensor] = {f"weight {name}": value for name, value in self.modules.named_parameters()}
        found |= {f"buffer {s.name}": s.value for s in self.modules.buffers_at if isinstance(s.value, Tensor)}
        self._take(found)
        self._unwritten.append((step, self._open))
        self._open = []
        if len(self._unwritten) == MAX_UNWRITTEN:
            self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Write the steps so far, durably if `sync`; waits for the device. Raises StorageError."""
        rows = []
        for step, parts in self._unwritten:
            row = np.zeros(len(self._places), np.int64)
            for places, digests in parts:
                row[places] = digests.cpu().numpy()
            rows.append((step, row))
        self._file.write(rows, sync=sync)
        self._unwritten.clear()

    def close(self) -> None:
        """Write what is left, as far as a device and a disk that may have failed allow, and close the file."""
        with contextlib.suppress(StorageError, RuntimeError):
            self.flush()
        self._file.close()

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            by_device.setdefault(tensor.device, {})[name] = tensor
        for group in by_device.values():
            self._open.append(([self._places[name] for name in group], self._digests(list(group.values()))))


def resume_digests(run: RunDir, world: World, step: int, *, writes: bool) -> None:
    """Make the folder what it was at `step`, from which the run resumes, except for files that ranks of this start open.

    Rank 0 cuts back those of ranks that this start doesn't have; if none of it `writes`, all of them. Under a URL, copies of
    files that ranks with another local directory write are deleted.
    """
    here = run.sharing.directory if writes else ()
    left = range(world.size) if writes else range(0)
    if not run.storage.is_local and run.sharing.first:
        for path in run.path(FOLDER).glob("rank-*.jsonl"):
            if rank_of(path.name) not in here:
                path.unlink(missing_ok=True)
    ranks = map(rank_of, run.storage.list(FOLDER)) if world.is_main else ()
    for rank in ranks:
        if rank is not None and rank not in left:
            run.resume_files(file_name(rank))
            cut_back(run.path(file_name(rank)), step)


def open_digests(run: RunDir, world: World, step: int, modules: Modules, optimizers: Collection[str]) -> StepDigests:
    """This rank's, after what it has recorded up to `step`."""
    name = file_name(world.rank)
    run.resume_files(name)
    return StepDigests(modules, optimizers, lambda names: DigestFile(run.path(name), world.rank, names, step))
