"""What a run keeps of the code and the objects that it was trained with, and what it says when they are others by now."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.callbacks import Callback
from dist_train.engine.callbacks import callback_states, load_callback_states


class Counter(Callback):
    def __init__(self, by: int = 1) -> None:
        self.by, self.value = by, 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Other(Counter):
    pass


def spec(kind: type[Counter], by: int) -> dict[str, Any]:
    return {"_target_": kind.__qualname__, "by": by}


@pytest.mark.parametrize(
    ("after", "values"),
    [
        ([(Counter, 1), (Counter, 2), (Other, 3)], [10, 20, 30]),
        ([(Other, 3), (Counter, 2), (Counter, 1)], [30, 20, 10]),  # reordered
        ([(Counter, 2), (Other, 3)], [20, 30]),  # the first is gone
        ([(Other, 9), (Counter, 1), (Counter, 2)], [30, 10, 20]),  # other arguments of the only one
        ([(Counter, 7), (Counter, 1), (Counter, 2), (Other, 3)], [0, 10, 20, 30]),  # a new one
        ([(Counter, 7), (Counter, 8)], [0, 0]),  # nobody can tell which was which
    ],
)
def test_a_callbacks_state_finds_it_again(after: list[tuple[type[Counter], int]], values: list[int]) -> None:
    def built(pairs: list[tuple[type[Counter], int]]) -> tuple[list[Counter], list[Any]]:
        return [kind(by) for kind, by in pairs], [spec(*pair) for pair in pairs]

    before, specs = built([(Counter, 1), (Counter, 2), (Other, 3)])
    for callback in before:
        callback.value = 10 * callback.by
    saved = callback_states([*before, Callback()], specs)
    callbacks, specs = built(after)
    notes: list[str] = []
    load_callback_states([*callbacks, Callback()], specs, saved, notes.append)
    assert [callback.value for callback in callbacks] == values
    assert len(notes) == (2 if values == [0, 0] else 0)


def test_states_that_an_earlier_version_saved_by_position_are_taken() -> None:
    callback = Counter()
    load_callback_states([callback], [spec(Counter, 1)], [{"value": 5}, {}], print)
    assert callback.value == 5
