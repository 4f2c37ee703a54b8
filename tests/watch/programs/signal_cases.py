"""What a process does with signals: carries out the function in argv[1], which prints what it has seen."""

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from dist_train.watch import signals


def me(number):
    os.kill(os.getpid(), number)


def taken(seconds=0.25):
    got = []
    while more := signals.take(seconds):
        got += more
    return sorted(got)


def busy_main_thread():
    signals.hold()
    threading.Timer(0.1, me, [signal.SIGTERM]).start()
    threading.Timer(0.2, me, [signal.SIGUSR1]).start()
    threading.Thread(target=lambda: (time.sleep(0.6), print(taken()))).start()
    ctypes.PyDLL(None).usleep(400000)


def own_handlers():
    heard = []
    for number in (signal.SIGCHLD, signal.SIGALRM, signal.SIGWINCH, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: heard.append(number))
    signals.hold()
    subprocess.run(["true"])
    for number in (signal.SIGALRM, signal.SIGWINCH, signal.SIGUSR2):
        me(number)
    print(taken(), sorted(heard) == sorted([17, 14, 28, 12]))


def pool():
    signals.hold()
    with multiprocessing.get_context("fork").Pool(2) as workers:
        print(sum(workers.map(abs, [-1, 2])))
    print(taken())


def event_loop():
    async def main():
        came = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, came.set)
        me(signal.SIGUSR2)
        await asyncio.wait_for(came.wait(), 5)
        me(signal.SIGTERM)

    signals.hold()
    asyncio.run(main())
    print(taken())
    me(signal.SIGHUP)
    print(taken())


def wakeup_descriptor():
    theirs, mine = socket.socketpair()
    mine.setblocking(False)
    signal.set_wakeup_fd(mine.fileno())
    signal.signal(signal.SIGUSR2, lambda *_: None)
    signals.hold()
    me(signal.SIGTERM)
    me(signal.SIGUSR2)
    print(taken(), list(theirs.recv(9)))
    signals.restore()
    print(signal.set_wakeup_fd(-1) == mine.fileno(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)


def nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.hold()
    me(signal.SIGHUP)
    print(taken())


def before_start():
    """Take the signal named in argv[2] before a run has started."""
    signals.install()
    threading.Timer(0.1, me, [signal.Signals[sys.argv[2]]]).start()
    time.sleep(20)


def interrupted_command():
    signals.install(stops=False)
    threading.Timer(0.1, me, [signal.SIGINT]).start()
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        print("as ever")


def stubborn_command():
    signals.install(stops=False)
    threading.Timer(0.1, me, [signal.SIGINT]).start()
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(20)


globals()[sys.argv[1]]()
