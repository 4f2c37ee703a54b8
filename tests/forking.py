"""Python processes that begin as a fork of one that has imported torch: most of the suite's time was that import.

tests/conftest.py puts `Popen` in the place of `subprocess.Popen`. For a command of this Python it gives the same pid, pipes,
session, signals, exit code and parent, but the process is forked from a *template* that has imported what every run imports.
The template has no thread, no process group and nothing of dist_train, so whatever dist_train does while it is imported
happens in each process as usual. Where something differs that is only read at a process's start (`_at_start`), and on other
systems than Linux, it is a real one. A forked torchrun forks its workers as well, and so does a real one, or a real
`accelerate launch`, that finds tests/hook in its PYTHONPATH (`HOOK`): it imports what they need once, before its first line.

The child is handed to the process that asked for it: its first parent ends, and the kernel gives it to the nearest ancestor
that has declared itself a subreaper.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import io
import multiprocessing.process
import os
import pickle
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# pydantic imports its parts when they are first named.
_SCHEMA = (
    "pydantic.types",
    "pydantic.json_schema",
    "pydantic.type_adapter",
    "pydantic.dataclasses",
    "pydantic._internal._validators",
)
# What a run imports of others; nothing here may start a thread, and nothing of dist_train may be among it.
PRELOADED = (
    "torch", "torch._dynamo", "torch.distributed.run", "torch.utils.tensorboard", "torch.utils.serialization", "torchvision",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "PIL.JpegImagePlugin",
    *_SCHEMA, "yaml", "fsspec.implementations.local", "safetensors.torch", "multiprocessing.popen_fork", "logging.handlers",
    "jinja2", "zoneinfo", "multiprocessing.queues",
)  # fmt: skip
# What a worker of a real torchrun needs in any case; the rest only rank 0 does, or no worker.
_WORKERS_NEED = (
    "torch.distributed.run", "torch._dynamo", "torch.utils.serialization", *_SCHEMA, "yaml", "fsspec.implementations.local",
    "safetensors.torch", "multiprocessing.popen_fork", "logging.handlers",
)  # fmt: skip
HOOK = Path(__file__).parent / "hook"
# Variables that are read when Python, a C library or a module is loaded.
_AT_START = (
    "PYTHON", "LD_", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "CUDA_", "TORCH_", "TORCHDYNAMO", "MPL", "TF_", "MALLOC_", "HOME",
    "LC_", "LANG",
)  # fmt: skip
_ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_HEADER = struct.Struct("Q")
_adoption = threading.Lock()  # being a subreaper is the whole process's: one child at a time is handed over
RealPopen = subprocess.Popen


def _at_start(env: dict[str, str]) -> dict[str, str]:
    """Of an environment, what a process reads only once, as it starts."""
    late = ("PYTHONPATH", "TORCH_NCCL")
    return {name: value for name, value in env.items() if name.startswith(_AT_START) and not name.startswith(late)}


class Template:
    """A process that forks others; its owner talks to it through a socket."""

    def __init__(self, channel: socket.socket, env: dict[str, str]):
        self._channel, self._env, self._owner = channel, _at_start(env), os.getpid()

    @classmethod
    def start(cls, env: dict[str, str]) -> Template:
        """A new one, with this environment; it ends with its owner."""
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forking; forking._main({theirs.fileno()})"
        RealPopen([sys.executable, "-c", code], env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        return cls(ours, env)

    def suits(self, env: dict[str, str]) -> bool:
        """Whether a process that this one starts may have been begun before its environment was known."""
        return os.getpid() == self._owner and _at_start(env) == self._env

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The pid of a new child of this process, which is what a request says, with these three descriptors."""
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        content = pickle.dumps({**request, "parent": os.getpid()})
        with _adoption:
            socket.send_fds(self._channel, [_HEADER.pack(len(content))], streams)
            self._channel.sendall(content)
            (pid,) = _HEADER.unpack(_read(self._channel, _HEADER.size))
            try:
                prctl(_SUBREAPER, 1, 0, 0, 0)
                self._channel.sendall(b"!")
                _read(self._channel, 1)
            finally:
                prctl(_SUBREAPER, 0, 0, 0, 0)
            # Raises where it isn't our child, for which `subprocess` would report exit code 0.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return pid


class Popen(RealPopen):  # type: ignore[type-arg]
    """`subprocess.Popen`; a command of this Python is forked from the template where that makes no difference."""

    template: Callable[[], Template] | None = None  # this process's

    def _execute_child(self, args: Any, *rest: Any) -> None:  # type: ignore[override]
        given = inspect.signature(super()._execute_child).bind(args, *rest).arguments  # type: ignore[misc]
        env = dict(os.environ) if given["env"] is None else dict(given["env"])
        asked = [
            name for name in ("preexec_fn", "pass_fds", "shell", "executable", "gid", "gids", "uid") if given[name]
        ]
        plain = not asked and given["umask"] < 0 and given["process_group"] < 0
        template = Popen.template() if Popen.template is not None and plain and _is_python(args) else None
        if template is None or not template.suits(env):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        request = {
            "args": [os.fspath(arg) for arg in args], "env": env, "cwd": os.fspath(given["cwd"] or os.getcwd()),
            "session": given["start_new_session"],
        }  # fmt: skip
        pipes = [(given["p2cread"], 0), (given["c2pwrite"], 1), (given["errwrite"], 2)]
        self.pid = template.fork(request, [own if pipe == -1 else pipe for pipe, own in pipes])
        self._child_created = True
        self._close_pipe_fds(*(given[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))


def take_over(env: dict[str, str]) -> None:
    """Let `subprocess` fork in this process, from a template that begins, when it is first needed, with `env`."""
    if sys.platform == "linux":
        lock, started = threading.Lock(), functools.cache(lambda: Template.start(env))

        def template() -> Template:
            with lock:  # functools.cache lets two threads start one each
                return started()

        Popen.template = template
        subprocess.Popen = Popen  # type: ignore[misc]


def _is_python(args: Any) -> bool:
    """Whether a command is this Python with a module, a script or a text, and no option but -u."""
    if isinstance(args, str | bytes | os.PathLike) or args[0] != sys.executable:
        return False
    words = [word for word in args[1:3] if word != "-u"]
    return bool(words) and (words[0] in ("-c", "-m") or not os.fspath(words[0]).startswith("-"))


def _read(channel: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        more = channel.recv(size - len(content))
        if not more:
            raise EOFError("the template has ended: see what it wrote to stderr")
        content += more
    return content


# What follows runs in the template.


_installed: list[str] = []  # sys.path without what is different in each process


def _preload(names: tuple[str, ...]) -> None:
    own = ["", str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    _installed.extend(place for place in sys.path if place not in own)
    for name in names:
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "dist_train" for name in sys.modules)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of its parent's threads"
    inspect.stack()  # which torchrun calls: the first time it looks at each module
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page


def _main(number: int) -> NoReturn:
    _preload(PRELOADED)
    _become(_serve(socket.socket(fileno=number)))


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Fork whenever the owner asks; returns in the children, with their requests."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ASKED}  # they are for the owner
    everything = signal.valid_signals()
    while True:
        header, streams, _, _ = socket.recv_fds(channel, _HEADER.size, 3)
        if not header:
            os._exit(0)  # the owner has ended
        while len(header) < _HEADER.size:
            header += _read(channel, _HEADER.size - len(header))
        request = pickle.loads(_read(channel, *_HEADER.unpack(header)))
        held = signal.pthread_sigmask(signal.SIG_BLOCK, everything)  # until a child can be ended by them
        first = os.fork()
        if not first:
            first_pid = os.getpid()
            second = os.fork()
            if second:
                channel.sendall(_HEADER.pack(second))
                channel.recv(1)  # the owner is ready to adopt
                os._exit(0)
            while os.getppid() == first_pid:
                time.sleep(0.0002)
            if os.getppid() != request["parent"]:
                os._exit(125)
            for place, stream in enumerate(streams):
                os.dup2(stream, place)
            channel.detach()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            for number, handler in before.items():
                signal.signal(number, handler)
            return {**request, "mask": held}
        for stream in streams:
            os.close(stream)
        os.waitpid(first, 0)
        with contextlib.suppress(BrokenPipeError):
            channel.sendall(b"!")
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _become(request: dict[str, Any]) -> NoReturn:
    """Be the process of a request, from its first line to its exit code."""
    if request["session"]:
        os.setsid()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
        code = _run(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    # As the interpreter does; but modules aren't taken apart, which would take a second.
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = 120
    ctypes.CDLL(None).fflush(None)
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def _run(request: dict[str, Any]) -> int:
    args, unbuffered = request["args"][1:], bool(os.environ.get("PYTHONUNBUFFERED"))
    if args[0] == "-u":
        args, unbuffered = args[1:], True
    os.chdir(request["cwd"])
    launches = args[:2] == ["-m", "torch.distributed.run"]
    if launches:
        _fork_workers(request["env"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()
    sys.modules["numpy"].random.seed()
    sys.orig_argv[:] = request["args"]
    _open_streams(unbuffered)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    places = [os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [*places, *_installed]
    importlib.invalidate_caches()
    if any(os.path.exists(os.path.join(place, "sitecustomize.py")) for place in places):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    sys.path.insert(0, {"-m": os.getcwd(), "-c": ""}.get(args[0], os.path.dirname(os.path.abspath(args[0]))))
    if args[0] == "-m":
        sys.argv[:] = ["-m", *args[2:]]
        if launches:
            del sys.modules[args[1]]  # which is executed again, as __main__
        runpy._run_module_as_main(args[1])  # type: ignore[attr-defined]
    elif args[0] == "-c":
        sys.argv[:] = ["-c", *args[2:]]
        exec(compile(args[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = args
        main.__dict__.update(__file__=args[0], __cached__=None, __spec__=None)
        exec(compile(Path(args[0]).read_bytes(), args[0], "exec"), main.__dict__)
    return 0


def _open_streams(unbuffered: bool) -> None:
    """`sys.stdin`, `sys.stdout` and `sys.stderr` of these descriptors, as Python opens them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode = "rb" if number == 0 else "wb"
        raw = open(number, mode, buffering=0 if unbuffered and number else -1, closefd=False)  # noqa: SIM115
        getattr(raw, "raw", raw).name = f"<{name}>"
        old = getattr(sys, f"__{name}__")
        stream = io.TextIOWrapper(
            raw, encoding=old.encoding, errors=old.errors, line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
            write_through=unbuffered,
        )  # fmt: skip
        stream.mode = mode[0]  # type: ignore[misc]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def be_launcher() -> None:
    """Let this real torchrun or `accelerate launch`, of which nothing has run, fork its workers."""
    if sys.platform == "linux" and Popen.template is None:  # it would be a forked one
        _preload(_WORKERS_NEED)
        _fork_workers(dict(os.environ))
        del sys.modules["torch.distributed.run"]  # which is executed again, as __main__
        subprocess.Popen = Popen  # type: ignore[misc]  # accelerate starts a single process itself


def _fork_workers(env: dict[str, str]) -> None:
    """Let this torchrun, which has no thread yet, fork its workers: from a copy of itself as it is now."""
    # It looks at its stack over and over: for frames without a file `inspect` would search all modules each time.
    inspect.modulesbyfile.update({os.path.abspath(name): "runpy" for name in ("<string>", "<frozen runpy>")})  # type: ignore[attr-defined]
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        _become(_serve(theirs))
    theirs.close()
    template = Template(ours, env)
    Popen.template = lambda: template
    importlib.import_module(
        "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    ).Popen = Popen
