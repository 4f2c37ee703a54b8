"""The control threads of all ranks agree on one tick, wherever each main thread stands."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch.distributed as dist

from dist_train.watch import control as control_module
from dist_train.watch.control import SAVE, STOP, Control, watch_clock, watch_file


def run_ranks(size: int, ticks: int, ask: dict[int, tuple[int, str]], seed: int) -> list[list[tuple[int, str]]]:
    """`size` control threads and main threads over one store; rank r requests `ask[r][1]` while in tick `ask[r][0]`.

    The main threads of real ranks move in lockstep, up to one tick apart, because each step ends in a collective: a barrier
    stands in for it here. Returns the actions of each rank, as (tick, action).
    """
    store = dist.HashStore()
    barrier = threading.Barrier(size)
    reported: list[list[tuple[int, str]]] = [[] for _ in range(size)]
    requests: list[list[tuple[str, str]]] = [[] for _ in range(size)]
    controls = [
        Control(rank, size, store, [lambda rank=rank: requests[rank].pop() if requests[rank] else None])
        for rank in range(size)
    ]

    def main(rank: int) -> None:
        pauses = random.Random(seed * 100 + rank)
        for tick in range(1, ticks + 1):
            controls[rank].begin()
            if rank in ask and ask[rank][0] == tick:
                requests[rank].append((ask[rank][1], f"rank {rank}"))
            time.sleep(pauses.random() * 0.02)
            barrier.wait(timeout=30)  # the collective
            for action in controls[rank].due():
                reported[rank].append((tick, action))
            if any(action == STOP for _, action in reported[rank]):
                break

    for control in controls:
        control.start()
    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a rank waits forever for the others"
    for control in controls:
        control.close()
    return reported


@pytest.mark.parametrize("seed", range(3))
def test_all_ranks_stop_after_the_same_tick(seed: int) -> None:
    reported = run_ranks(3, 200, {1: (5 + seed, STOP), 2: (6, STOP)}, seed)
    assert len(reported[0]) == 1
    assert reported[0][0][1] == STOP
    assert reported[0] == reported[1] == reported[2]


def test_a_save_is_agreed_and_the_run_continues() -> None:
    reported = run_ranks(2, 120, {0: (3, SAVE), 1: (60, SAVE)}, 7)
    assert [action for _, action in reported[0]] == [SAVE, SAVE]
    assert reported[0] == reported[1]


def test_one_process_needs_no_store() -> None:
    requests = [(STOP, "SIGTERM")]
    control = Control(0, 1, None, [lambda: requests.pop() if requests else None])
    control.start()
    seen: set[str] = set()
    deadline = time.monotonic() + 10
    while STOP not in seen and time.monotonic() < deadline:
        control.begin()
        time.sleep(0.01)
        seen = control.due()
    control.close()
    assert seen == {STOP}
    assert control.reasons[STOP] == "SIGTERM"


def test_closing_waits_for_no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "POLL_SECONDS", 600.0)
    control = Control(0, 1, None)
    control.start()
    control.close()
    assert not control._thread.is_alive()


def test_inside_an_evaluation_only_a_stop_counts_and_the_rest_is_postponed() -> None:
    requests = [(SAVE, "clock")]
    control = Control(0, 1, None, [lambda: requests.pop() if requests else None])
    control.start()
    time.sleep(0.6)
    control.begin()
    assert not control.stop_due()
    control.begin()
    assert control.due() == {SAVE}
    control.close()


def test_files_request_once_and_clocks_each_interval() -> None:
    there = {"STOP"}
    source = watch_file(lambda name: name in there and not there.discard(name), STOP, "STOP")
    assert source() == (STOP, "file STOP")
    assert source() is None
    now = [0.0]
    clock = watch_clock(lambda: now[0], 10.0, 10.0, SAVE, "every 10s")
    asked = []
    for now[0] in (5.0, 10.0, 11.0, 35.0, 36.0, 40.0):
        asked.append(clock() is not None)
    assert asked == [False, True, False, True, False, True]


def test_a_stop_is_answered_once_and_before_the_other_ranks_have_voted() -> None:
    store, heard = dist.HashStore(), list[str]()

    def answer(reason: str) -> None:
        assert not control.reasons, "not agreed yet"
        heard.append(reason)

    control = Control(0, 1, store, on_stop=answer)
    for reason in ("SIGINT", "SIGTERM"):
        control._propose(STOP, reason)
    control._answer()
    assert heard == ["SIGINT"]
    assert control.reasons == {STOP: "SIGINT"}
