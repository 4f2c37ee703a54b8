"""Batches are copied to the GPU beside the kernels of the step before, and are right."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.task.batch import move_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_pinned_batches_are_copied_on_another_stream_and_are_those_that_were_sent() -> None:
    device, work = torch.device("cuda", 0), torch.randn(4096, 4096, device="cuda")
    batches = [torch.randint(0, 256, (64, 3, 128, 128), dtype=torch.uint8).pin_memory() for _ in range(20)]
    sums = []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for batch in batches:
            moved, _ = move_batch((batch, torch.zeros(2)), device, torch.channels_last)
            for _ in range(3):  # the host is ahead of the device, and memory of batches is used again
                work = work @ work * 1e-3
            sums.append(moved.long().sum() + 0 * work.isnan().sum())
            del moved
        torch.cuda.synchronize()
    assert [int(total) for total in sums] == [int(batch.long().sum()) for batch in batches]
    events = [event for event in profiler.profiler.kineto_results.events() if event.device_type().name == "CUDA"]
    copies = {event.device_resource_id() for event in events if "HtoD" in event.name() and event.nbytes() > 10_000}
    kernels = {event.device_resource_id() for event in events if "gemm" in event.name().lower()}
    assert copies
    assert not copies & kernels
