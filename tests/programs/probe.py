"""Print what a process can find out about itself, and whether torch is imported already."""

import json
import os
import signal
import sys
import tempfile
import threading


def streams(name):
    stream, first = getattr(sys, name), getattr(sys, f"__{name}__")
    return [
        stream is first,
        stream.fileno(),
        stream.encoding,
        stream.errors,
        stream.line_buffering,
        stream.mode,
        stream.write_through,
        type(stream.buffer).__name__,
        stream.name,
    ]


main = sys.modules["__main__"]
print(
    json.dumps(
        {
            "name": __name__,
            "main": main.__dict__ is globals(),
            "spec": getattr(__spec__, "name", None),
            "package": __package__,
            "argv": sys.argv,
            "orig_argv": sys.orig_argv,
            "path": sys.path,
            "flags": str(sys.flags),
            "executable": sys.executable,
            "cwd": os.getcwd(),
            "env": dict(os.environ),
            "temp": tempfile.gettempdir(),
            "umask": os.umask(0o22),
            "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
            "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "wakeup": signal.set_wakeup_fd(-1),
            "descriptors": sorted(
                name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
            ),
            "tasks": len(os.listdir("/proc/self/task")),
            "threads": [thread.name for thread in threading.enumerate()],
            "parent": os.getppid(),
            "own group": os.getpgrp() == os.getpid(),
            "own session": os.getsid(0) == os.getpid(),
            "ours": [name for name in sys.modules if name.split(".")[0] == "dist_train"],
            "streams": [streams(name) for name in ("stdin", "stdout", "stderr")],
            "tracing": sys.gettrace() is None,
        }
    )
)
print("torch" in sys.modules)
