"""What a process says when it fails: once, in words, where a person and torchrun will look."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import sysconfig
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from dist_train.config.errors import ConfigError, error_text, mask, visible
from dist_train.runtime.launch import read_placement
from dist_train.watch import signals
from dist_train.watch.status import DONE, EVALUATION, PHASES, STARTING, status

Record = dict[str, Any]

# What a rank hears of a peer that has gone (gloo, NCCL, the store): the peer's own message matters, not this one.
_PEER_GONE = re.compile(
    r"Connection (was likely )?(closed|reset)|Broken pipe|gloo/|NCCL|remote process exited|"
    r"Timed out waiting \d+ms for (recv|send)|wait timeout after"
)
_PATIENCE = 10.0
_MOST = 20_000  # characters of a traceback's beginning, and of its end
tells_config_errors = False  # whether the ranks have agreed that this one does, though it isn't rank 0
_FRAME = re.compile(r'^ *File "([^"]+)", line (\d+), in (\S+)(?:\n +(?!File "|[~^])(.+))?', re.MULTILINE)
# In the words of torch, CUDA, cuBLAS, cuDNN and its like, NCCL ("Cuda failure 'out of memory'"), NumPy, the C library.
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|out of memory|(can't|cannot|unable to) allocate (memory|\d)|not enough memory|bad_alloc|"
    r"_ALLOC_FAILED|_ALLOCATION_FAILED|Unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)
_HARDWARE = "dmesg | grep Xid, nvidia-smi -q: the GPU or its driver; another host, or a reset by who looks after it"
_HINTS = {  # the first pattern that is found counts; torch ends each "CUDA error: ..." with a line on "device-side assertions"
    "NonFiniteError": "optimizer.lr lower, trainer.clip_grad_norm=1, or trainer.on_nonfinite=skip; look at those samples",
    "SampleError": "read that sample by hand: its dataset class, its index; data.num_workers=0 makes it debuggable",
    r"DataLoader worker \(pid": "data.num_workers=0 shows an error in the dataset itself; more /dev/shm, or more memory",
    r"/dev/shm|shared memory\(shm\)": "df -h /dev/shm: docker run --shm-size=8g, or fewer data.num_workers",
    r"No space left|Errno 28": "make room (df -h), or keep less: checkpoint.keep_last=1, and every checkpoint.every less often",
    "shapes cannot be multiplied": "the layer's in_features must be what comes out of the layer before it",
    "must have the same dtype": "inputs must have the weights' dtype: return x.float() from the dataset (uint8 images: x / 255)",
    "IndexError: Target": "labels must be 0 ... classes - 1, and the model's last layer must have that many outputs",
    "device-side assert triggered": "the same with CUDA_LAUNCH_BLOCKING=1, or distributed.device=cpu, names the true line; "
    "mostly a label or an index out of range",
    "illegal memory access|misaligned address|unspecified launch failure|illegal instruction": "the same with "
    "CUDA_LAUNCH_BLOCKING=1 names the true line, compute-sanitizer the kernel; or it is the hardware: dmesg | grep Xid",
    "no kernel image|unsupported toolchain": "torch, or an extension, is built for other GPUs or a newer driver than this one's: "
    "torch.cuda.get_arch_list(); install a build for it, or TORCH_CUDA_ARCH_LIST for the extension",
    "driver on your system is too old|driver version is insufficient|forward compatibility was attempted": "update the NVIDIA "
    "driver (a container uses the host's; after an update: a reboot), or install a torch build for an older CUDA",
    "ECC error|fallen off the bus|NVLink error|hardware stack error": _HARDWARE,
    "CUDA error: unknown error|Cuda failure 999|device is lost": _HARDWARE,
    "system not yet initialized": "nvidia-fabricmanager must run on that host: systemctl status nvidia-fabricmanager",
    "busy or unavailable": "nvidia-smi: another process has the GPU to itself (compute mode)",
    "re-initialize CUDA in forked": "nothing on CUDA in the dataset; or data.multiprocessing_context=spawn",
    "Duplicate GPU detected": "a GPU a rank: fewer processes (--nproc_per_node), or CUDA_VISIBLE_DEVICES as it was given",
    "collective operation timeout|WorkNCCL": "a rank that is late, or in another collective: the logs of all ranks, "
    "logs/nccl-rank-N.json; distributed.hang_timeout longer if it is only slow",
    "NCCL": "NCCL_DEBUG=INFO names the call; NCCL_SOCKET_IFNAME the network; `doctor` measures it; "
    "docker run --shm-size=8g --ulimit memlock=-1",
    "CUBLAS_STATUS|CUDNN_STATUS|unable to find an engine": "mostly too little memory left (trainer.micro_batch_size smaller), "
    "a label or an index out of range (CUDA_LAUNCH_BLOCKING=1), or libraries of another CUDA (LD_LIBRARY_PATH)",
    "out of resource": "a kernel that torch.compile made is too large for this GPU: trainer.compile=false",
    "LeaseLostError": "nothing here: the run is another job's by now, or was taken away; start it again where it is to live",
    "CheckpointError": "the directory's space and permissions (df -h; touch a file there); what was saved before is whole",
    "": "the same command with one process and data.num_workers=0 is the shortest way to see it again, in a debugger too",
}


def rank_of_this_process() -> int:
    """The rank as the environment tells it, before anything was set up."""
    with contextlib.suppress(ConfigError):
        return read_placement(os.environ).rank
    return 0


def tell_config_error(text: str) -> None:
    """A config error, from rank 0 only. The others wait: torchrun ends everybody as soon as one rank has left.

    If nobody has ended this rank by then, rank 0 is of another opinion (a module that only this node lacks, say): it speaks.
    """
    rank = rank_of_this_process()
    if rank != 0 and not tells_config_errors:
        signals.hold()
        if signals.take(_PATIENCE):
            return  # the launcher ends this rank, because rank 0 has spoken and left
    if rank != 0:
        text = f"rank {rank} on {socket.gethostname()}:\n{text}"
    write_error_file(text, "")
    print(text, file=sys.stderr, flush=True)


def standing(rank: int) -> Record:
    """Who this process is, and where its main thread stands."""
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "phase": status.phase,
        "step": status.step,
    }


def record_of(kind: str, stands: Mapping[str, Any], samples: Sequence[int] = ()) -> Record:
    """The record of a failure (`raised`, `gone` or `hang`) of the rank that stands there, with these samples of its step."""
    place = {name: stands[name] for name in ("rank", "host", "pid", "phase", "step")}
    return {"kind": kind, **place, "samples": [int(sample) for sample in samples[:16]], "count": len(samples)}


def describe(error: BaseException, rank: int = 0, samples: Sequence[int] = ()) -> Record:
    """The record of an exception on this rank: where it stood, what was raised in whose line, what to try."""
    details = visible(mask("".join(traceback.format_exception(error))))
    if len(details) > 2 * _MOST:
        details = f"{details[:_MOST]}\n... ({len(details):,} characters) ...\n{details[-_MOST:]}"
    text = one_line(error)
    told = {"error": text, "line": user_line(details), "details": details, "try": advice(text)}
    return {**record_of("raised", standing(rank), samples), **told}


def one_line(error: BaseException) -> str:
    """Type and message on one line; of an exception that a loader worker raised, its own and not the wrapping."""
    text = mask(error_text(error))
    if "Original Traceback" in text:
        return visible(text.strip().splitlines()[-1].strip())
    text = " ".join(text.split())
    return visible(f"{type(error).__name__}: {text}"[:1000] if text else type(error).__name__)


def user_line(details: str) -> str:
    """`FILE:LINE, in NAME: CODE`: the innermost line of the user's own code in a printed traceback; "" if there is none.

    Causes come first in a traceback, and the first cause is where it began.
    """
    import dist_train

    package = os.path.dirname(os.path.abspath(dist_train.__file__)) + os.sep
    others = (package, sysconfig.get_path("stdlib") + os.sep, "<")
    for block in details.split("Traceback (most recent call last)"):
        frames = [frame.groups() for frame in _FRAME.finditer(block)]
        own = [frame for frame in frames if not frame[0].startswith(others) and "-packages" + os.sep not in frame[0]]
        if own:
            file, line, name, code = own[-1]
            return f"{file}:{line}, in {name}" + (f": {code}" if code else "")
    return ""


def is_out_of_memory(text: str) -> bool:
    """Whether an exception's line says that memory ran out, on a GPU or on the host."""
    return bool(_OUT_OF_MEMORY.search(text))


def less_memory(micro: int, changes: str) -> str:
    """What to try when a forward or backward of `micro` samples needed too much; `changes`: beside the memory, if anything."""
    if micro == 1:
        return "not even one sample at a time fits: a smaller model or input, or trainer.precision=bf16"
    effect = f"less memory, but {changes}" if changes else "the same gradient in less memory"
    return f"trainer.micro_batch_size={micro // 2} (it was {micro}): {effect}"


def advice(text: str) -> str:
    """What to try, from what is known to cause such an error."""
    if is_out_of_memory(text):
        if status.phase == EVALUATION:
            return "data.eval_batch_size smaller: an evaluation takes that many samples in a forward"
        return "a smaller model or input, trainer.precision=bf16; data.num_workers=0 if it is the host's memory"
    return next(hint for pattern, hint in _HINTS.items() if re.search(pattern, text))


def summary(record: Record, size: int = 1, logs: str = "") -> str:
    """The few lines that say everything once."""
    rank = f"rank {record['rank']}" + (f" of {size}" if size > 1 else "")
    verb = {"raised": "failed", "gone": "has gone", "hang": "hangs"}[record["kind"]]
    samples = ", ".join(str(sample) for sample in record["samples"])
    if record["count"] > len(record["samples"]):
        samples += f", ... ({record['count']} in all)"
    facts = {
        "pid": str(record["pid"]),
        "error": record["error"],
        "your code": record.get("line", ""),
        "samples": samples,
        "ranks": record.get("ranks", ""),
        "try": record.get("try", ""),
        "logs": logs,
    }
    lines = [f"dist_train: {rank} on {record['host']} {verb} {_place(record)}"]
    return "\n".join([*lines, *(f"  {name:<10} {value}" for name, value in facts.items() if value)])


def cause(record: Record) -> str:
    """The same in one line, for status.json and attempts.jsonl."""
    return f"rank {record['rank']} on {record['host']} {_place(record)}: {record['error']}"


def _place(record: Record) -> str:
    if record["phase"] in (STARTING, DONE):
        return "while starting" if record["phase"] == STARTING else "at the end"
    phase = PHASES[record["phase"]]
    return f"in step {record['step']} ({phase})" if record["step"] else f"in {phase}"


def tell(record: Record, size: int = 1, logs: str = "") -> None:
    """Say it on the terminal and to torchrun."""
    text, details = summary(record, size, logs), record.get("details", "")
    write_error_file(text, details)
    print(*filter(None, [details, text]), sep="\n", file=sys.stderr, flush=True)


def tell_crash(error: BaseException) -> None:
    """A crash of a process that has no peers to tell: the traceback, then the summary."""
    record = getattr(error, "dist_train_record", None) or describe(error, rank_of_this_process())
    tell(record, logs=record.get("logs", ""))


def or_of_a_worker(error: BaseException, last: bool) -> BaseException:
    """The error, or what torch has to say of a loader worker that was killed: it raises out of SIGCHLD's handler.

    That may come later than what the main thread sees of it, and anywhere; where this is the process's `last` error, no more.
    """
    try:
        if isinstance(error, ConnectionError | EOFError):
            time.sleep(0.5)
        if last:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except RuntimeError as told:
        return told
    except ValueError:
        pass  # not the main thread
    return error


def is_peer_failure(error: BaseException) -> bool:
    """Whether this may be only what a rank hears when another one has failed."""
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")  # no subclass of a user's
    return type(error).__name__ in kinds and bool(_PEER_GONE.search(str(error)))


def write_error_file(message: str, details: str) -> None:
    """torchrun prints this as the root cause in its own last lines (torch.distributed.elastic.multiprocessing.errors)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time())), **({"traceback": details} if details else {})}
    with contextlib.suppress(OSError):  # the terminal has it
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
