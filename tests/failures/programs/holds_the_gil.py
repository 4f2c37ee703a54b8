"""A rank that hangs in C code while it holds the GIL."""

import ctypes
import time

from dist_train.watch import peers, status
from dist_train.watch.processes import owned_by_command

peers.DEAF_SECONDS = 0.5
with owned_by_command():
    peers.Peers(hang_timeout=1.0).start()
    status.status.phase = status.FORWARD
    time.sleep(0.8)
    ctypes.PyDLL(None).sleep(60)
