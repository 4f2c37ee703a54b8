"""What a process says when it fails: once, in words, where a person and torchrun will look."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback

from dist_train.runtime import signals

# What gloo and the store say on a rank whose peer has gone: the peer's own message matters, not this one.
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed")
_PATIENCE = 10.0


def rank_of_this_process() -> int:
    """The rank as the environment tells it, before anything was set up."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def tell_config_error(text: str) -> None:
    """A config error, from rank 0 only. The others wait: torchrun ends everybody as soon as one rank has left.

    If nobody has ended this rank by then, rank 0 is of another opinion (a module that only this node lacks, say): it speaks.
    """
    rank = rank_of_this_process()
    if rank != 0:
        if signals.wait(_PATIENCE):
            return  # the launcher ends this rank, because rank 0 has spoken and left
        text = f"rank {rank} on {socket.gethostname()}:\n{text}"
    write_error_file(text, "")
    print(text, file=sys.stderr, flush=True)


def tell_crash(error: BaseException, where: str = "") -> None:
    """A crash: the traceback, then one summary with rank, host, place and cause. A rank whose peer has gone only waits."""
    rank = rank_of_this_process()
    text = f"rank {rank} on {socket.gethostname()} failed{where}: {type(error).__name__}: {error}"
    details = "".join(traceback.format_exception(error))
    if is_peer_failure(error):
        signals.wait(_PATIENCE / 2)
        text = f"rank {rank} on {socket.gethostname()}: another rank has gone ({error})"
    else:
        print(details, file=sys.stderr, flush=True)
    write_error_file(text, details)
    print(text, file=sys.stderr, flush=True)


def is_peer_failure(error: BaseException) -> bool:
    """Whether this rank failed only because another one had."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _PEER_GONE)


def write_error_file(message: str, details: str) -> None:
    """torchrun prints this as the root cause in its own last lines (torch.distributed.elastic.multiprocessing.errors)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    record = {
        "message": {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    }
    if details:
        record["message"]["extraInfo"]["traceback"] = details  # type: ignore[index]
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            json.dump(record, file)
    except OSError:
        pass  # the terminal has it
