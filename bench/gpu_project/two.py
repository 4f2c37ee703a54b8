"""Trainings of the overrides in argv[1], by ranks that share one GPU if there is one: python two.py '[["run.name=a"], ...]'."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

import dist_train.runtime.world as world
from dist_train.run.api import train

if torch.cuda.is_available():  # NCCL refuses two ranks on one GPU; gloo moves CUDA tensors through the host

    def one_card(choice: Any, placement: Any) -> torch.device:
        """Rank 0's GPU for each rank."""
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)

    join = dist.init_process_group

    def over_gloo(backend: str, **options: Any) -> None:
        """As the original, by gloo alone."""
        join("cpu:gloo,cuda:gloo", **{**options, "device_id": None})

    world.pick_device = one_card
    dist.init_process_group = over_gloo  # type: ignore[assignment]

for overrides in json.loads(sys.argv[1]):  # sequentially in the same processes: starting them takes most of the time
    train("c.yaml", *overrides)
