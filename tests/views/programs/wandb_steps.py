"""Log steps FIRST+1..LAST to W&B and the record, then end with an outcome or by SIGKILL: ROOT FIRST LAST END [SECONDS]."""

import os
import pathlib
import signal
import sys
import time
import types

from dist_train.config.schema_tracking import WandbConfig
from dist_train.tracking.console import Console
from dist_train.views.sinks import open_logger

root, first, last, end = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
wandb = WandbConfig(project="p", mode="offline", tags=["a"])
tracking = types.SimpleNamespace(tensorboard=False, wandb=wandb)
config = types.SimpleNamespace(tracking=tracking, to_dict=lambda: {"optimizer": {"lr": 0.1}})
log = open_logger(root, config, Console(True), start_step=first)
for step in range(first + 1, last + 1):
    log.row("train", step, 1, step * 64, {"loss": 1 / step, "bad": float("nan")})
    if step % 5 == 0:
        log.row("val", step, 1, step * 64, {"accuracy": 1 - 1 / step})
if end == "kill":
    time.sleep(float(sys.argv[5]))
    os.kill(os.getpid(), signal.SIGKILL)
log.close(end, timeout=60)
