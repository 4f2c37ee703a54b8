"""What a process reports when it fails: one record, in words for a person, for torchrun and for the run's records."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import sysconfig
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from dist_train.config.errors import error_text, mask, visible
from dist_train.tracking.terminal import columns, has_color, is_terminal, painted, wrapped
from dist_train.watch.status import DONE, EVALUATION, PHASES, STARTING, status

Record = dict[str, Any]
EXIT_CODE_FILE = "DIST_TRAIN_EXIT_CODE_FILE"  # set by `--nproc`: where rank 0 leaves its exit code

_MOST = 20_000  # characters of a traceback's beginning, and of its end
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FRAME = re.compile(r'^ *File "([^"]+)", line (\d+), in (\S+)(?:\n +(?!File "|[~^])(.+))?', re.MULTILINE)
# What gloo, NCCL and the store raise on a rank when a peer is lost: the peer's own error matters, not this one.
_PEER_LOST = re.compile(
    r"Connection (was likely )?(closed|reset)|Broken pipe|gloo/|NCCL|remote process exited|"
    r"Timed out waiting \d+ms for (recv|send)|wait timeout after"
)
# Out of memory as torch, CUDA, cuBLAS, cuDNN and the like, NCCL ("Cuda failure 'out of memory'"), NumPy and libc say it.
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|out of memory|(can't|cannot|unable to) allocate (memory|\d)|not enough memory|bad_alloc|"
    r"_ALLOC_FAILED|_ALLOCATION_FAILED|Unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)
_HARDWARE = "GPU or driver fault: check dmesg | grep Xid and nvidia-smi -q; use another host, or have this one reset"
_HINTS = {  # the first pattern that matches counts; torch ends each "CUDA error: ..." with a line on "device-side assertions"
    "NonFiniteError": "lower optimizer.lr, trainer.clip_grad_norm=1, or trainer.on_nonfinite=skip; check those samples",
    "SampleError": "read that sample by hand (dataset class and index); data.num_workers=0 makes it debuggable; "
    "data.on_error=skip trains on without it",
    r"DataLoader worker \(pid": "data.num_workers=0 shows an error in the dataset itself; more /dev/shm, or more memory",
    r"/dev/shm(?![/\w])|shared memory ?\(shm\)|shared memory (object|segment)": "df -h /dev/shm: docker run --shm-size=8g, or "
    "fewer data.num_workers",
    r"No space left|Errno 28": "free disk space (df -h), or keep less: checkpoint.keep_last=1, a longer checkpoint.every",
    "shapes cannot be multiplied": "the layer's in_features must equal the out_features of the layer before it",
    r"must have the same dtype|\(unsigned char\) and (bias|weight) type": "inputs must have the weights' dtype: return x.float() "
    "from the dataset; uint8 images: data.normalize={mean: 0, std: 1} makes them floats in [0, 1] on the device",
    "IndexError: Target": "labels must be 0 ... classes - 1, and the model's last layer must have as many outputs",
    "device-side assert triggered": "rerun with CUDA_LAUNCH_BLOCKING=1 or distributed.device=cpu to get the true line; "
    "usually a label or an index out of range",
    "illegal memory access|misaligned address|unspecified launch failure|illegal instruction": "CUDA_LAUNCH_BLOCKING=1 shows "
    "the true line, compute-sanitizer the kernel; or a hardware fault: dmesg | grep Xid",
    "no kernel image|unsupported toolchain": "torch, or an extension, is built for other GPUs or a newer driver: see "
    "torch.cuda.get_arch_list(); install a build for this GPU, or set TORCH_CUDA_ARCH_LIST for the extension",
    "driver on your system is too old|driver version is insufficient|forward compatibility was attempted": "update the NVIDIA "
    "driver (a container uses the host's; reboot after an update), or install a torch build for an older CUDA",
    "ECC error|fallen off the bus|NVLink error|hardware stack error": _HARDWARE,
    "CUDA error: unknown error|Cuda failure 999|device is lost": _HARDWARE,
    "system not yet initialized": "nvidia-fabricmanager must run on that host: systemctl status nvidia-fabricmanager",
    "busy or unavailable": "nvidia-smi: another process holds the GPU exclusively (compute mode)",
    "re-initialize CUDA in forked": "keep CUDA out of the dataset, or set data.worker_start_method=spawn",
    "Duplicate GPU detected": "one GPU per rank: start fewer processes (--nproc_per_node), or check CUDA_VISIBLE_DEVICES",
    "collective operation timeout|WorkNCCL": "a rank is late, or in another collective: see the logs of all ranks and "
    "logs/nccl-rank-N.json; a longer distributed.hang_timeout if it is only slow",
    "NCCL": "NCCL_DEBUG=INFO shows the failing call; set NCCL_SOCKET_IFNAME to the right network; `doctor` measures it; "
    "docker run --shm-size=8g --ulimit memlock=-1",
    "CUBLAS_STATUS|CUDNN_STATUS|unable to find an engine": "usually too little memory left (smaller trainer.micro_batch_size), "
    "a label or an index out of range (CUDA_LAUNCH_BLOCKING=1), or mismatched CUDA libraries (LD_LIBRARY_PATH)",
    "out of resource": "a kernel generated by torch.compile is too large for this GPU: trainer.compile=false",
    "LeaseLostError": "nothing to fix here: another job owns the run by now, or it was deleted",
    "CheckpointError": "check space and permissions of the directory (df -h; touch a file there); earlier checkpoints are intact",
    "": "run the same command with one process and data.num_workers=0 to reproduce it in the simplest setting, or in a debugger",
}


def own_position(rank: int) -> Record:
    """Who this process is, and the step and phase of its main thread."""
    who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
    return {**who, "phase": status.phase, "step": status.step}


def new_record(kind: str, position: Mapping[str, Any], samples: Sequence[int] = (), size: int = 1) -> Record:
    """The record of a failure (`raised`, `lost` or `hang`) of the rank at that position, with its samples of that step."""
    where = {name: position[name] for name in ("rank", "host", "pid", "phase", "step")}
    return {"kind": kind, **where, "size": size, "samples": [*map(int, samples[:16])], "count": len(samples)}


def describe(error: BaseException, rank: int = 0, samples: Sequence[int] = (), size: int = 1) -> Record:
    """The record of an exception on this rank: its position, the error, the user's line that raised it, a hint."""
    details = visible(mask("".join(traceback.format_exception(error))))
    if len(details) > 2 * _MOST:
        details = f"{details[:_MOST]}\n... ({len(details):,} characters) ...\n{details[-_MOST:]}"
    text = one_line(error)
    described = {"error": text, "line": user_line(details), "details": details, "try": hint(text)}
    return {**new_record("raised", own_position(rank), samples, size), **described}


def one_line(error: BaseException) -> str:
    """Type and message on one line; for an exception raised in a loader worker, its own rather than the wrapper's."""
    text = mask(error_text(error))
    if "Original Traceback" in text:
        return visible(text.strip().splitlines()[-1].strip())
    text = " ".join(text.split())
    return visible(f"{type(error).__name__}: {text}"[:1000] if text else type(error).__name__)


def user_line(details: str) -> str:
    """`FILE:LINE, in NAME: CODE`: the innermost line of the user's own code in a printed traceback; "" if there is none.

    Causes come first in a traceback, and the first cause is where it began.
    """
    others = (_PACKAGE, sysconfig.get_path("stdlib") + os.sep, "<")
    for block in details.split("Traceback (most recent call last)"):
        frames = [frame.groups() for frame in _FRAME.finditer(block)]
        own = [frame for frame in frames if not frame[0].startswith(others) and "-packages" + os.sep not in frame[0]]
        if own:
            file, line, name, code = own[-1]
            return f"{file}:{line}, in {name}" + (f": {code}" if code else "")
    return ""


def less_memory(micro: int, changes: str, auto: bool) -> tuple[str, int | None]:
    """What to do when a forward or backward of `micro` samples ran out of memory.

    `changes` is what smaller micro-batches change beside the memory ("" for nothing), `auto` whether the engine chose the
    size. Returns a hint, and the size that all ranks can restart with by themselves, if any.
    """
    if micro == 1:
        return "not even a single sample fits: a smaller model or input, or trainer.precision=bf16", None
    effect = f"less memory, but {changes}" if changes else "the same gradient in less memory"
    text = f"trainer.micro_batch_size={micro // 2} (it was {micro}): {effect}"
    return text, micro // 2 if auto and not changes else None


def is_out_of_memory(text: str) -> bool:
    """Whether an exception's line says that memory ran out, on a GPU or on the host."""
    return bool(_OUT_OF_MEMORY.search(text))


def hint(text: str) -> str:
    """What to try, from the known causes of such an error."""
    if is_out_of_memory(text):
        if status.phase == EVALUATION:
            return "a smaller data.eval_batch_size: an evaluation runs that many samples in one forward"
        return "a smaller model or input, trainer.precision=bf16; data.num_workers=0 if it is the host's memory"
    return next(hint for pattern, hint in _HINTS.items() if re.search(pattern, text))


def is_peer_failure(error: BaseException) -> bool:
    """Whether this may be only the echo of another rank's failure."""
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")  # not a user's subclass
    return type(error).__name__ in kinds and bool(_PEER_LOST.search(str(error)))


def summary(record: Record) -> str:
    """The few lines that state everything once."""
    rank = f"rank {record['rank']}" + (f" of {record['size']}" if record["size"] > 1 else "")
    verb = {"raised": "failed", "lost": "was lost", "hang": "hangs"}[record["kind"]]
    samples = ", ".join(str(sample) for sample in record["samples"])
    if record["count"] > len(record["samples"]):
        samples += f", ... ({record['count']} in all)"
    shown = {**record, "your code": record.get("line"), "samples": samples}
    if record.get("details") and record.get("logs"):
        shown["traceback"] = shown.pop("logs")
    names = ("pid", "error", "your code", "samples", "ranks", "try", "traceback", "logs")
    first = f"dist_train: {rank} on {record['host']} {verb} {_place(record)}"
    return "\n".join([first, *(f"  {name:<10} {shown[name]}" for name in names if shown.get(name))])


def cause(record: Record) -> str:
    """The same in one line, for status.json and attempts.jsonl."""
    return f"rank {record['rank']} on {record['host']} {_place(record)}: {record['error']}"


def _place(record: Record) -> str:
    phase, step = PHASES[record["phase"]], record["step"]
    here = f"in step {step} ({phase})" if step else f"in {phase}"
    return {STARTING: "while starting", DONE: "at the end"}.get(record["phase"], here)


def report(record: Record, rank: int | None = None) -> None:
    """Print the summary, below the traceback where no log file has that; hand both to torchrun.

    `rank` is this one, where the failure may be another's: torchrun seldom shows what this rank says of that, or of a hang.
    """
    text, details = summary(record), record.get("details", "")
    write_error_file(text, details)
    mine = record["kind"] == "raised" and rank in (None, record["rank"])
    if mine and torchrun_shows():
        return
    leave_code(1)
    if details and not record.get("logs"):
        print(details, file=sys.stderr)
    first, *lines = text.splitlines()
    color, width = has_color(sys.stderr), columns(sys.stderr)
    if is_terminal(sys.stderr):
        first, lines = wrapped(first, width), [wrapped(line, width, " " * 13) for line in lines]
    print(painted(first, "red", color), *lines, sep="\n", file=sys.stderr, flush=True)


def leave_code(code: int) -> None:
    """For `--nproc`, which would only learn from torchrun whether it is 0: the exit code of this command."""
    file = os.environ.get(EXIT_CODE_FILE)
    if file is not None:
        with contextlib.suppress(OSError), open(file, "w") as opened:
            opened.write(str(code))


def torchrun_shows() -> bool:
    """Whether torchrun, when this process has failed, ends with a report of its own that holds this process's error file."""
    env = os.environ
    last = env.get("TORCHELASTIC_RESTART_COUNT", "0") == env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return last and "TORCHELASTIC_ERROR_FILE" in env and EXIT_CODE_FILE not in env


def write_error_file(message: str, details: str = "") -> None:
    """torchrun prints this as the root cause in its own last lines (torch.distributed.elastic.multiprocessing.errors)."""
    extra = {"py_callstack": message, "timestamp": str(int(time.time())), **({"traceback": details} if details else {})}
    with contextlib.suppress(OSError, KeyError):  # the terminal has it; nobody reads it without torchrun
        path = os.environ["TORCHELASTIC_ERROR_FILE"]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
