"""Threads that each start a Python at the same moment, in a process that hasn't started one yet: their exit codes."""

import os
import subprocess
import sys
import threading

import forking

forking.take_over(dict(os.environ))
barrier = threading.Barrier(6)
codes = []


def start(code: int) -> None:
    barrier.wait()
    codes.append((code, subprocess.run([sys.executable, "-c", f"raise SystemExit({code})"]).returncode))


threads = [threading.Thread(target=start, args=(code,)) for code in range(1, 7)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sorted(codes))
