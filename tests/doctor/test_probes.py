"""What the doctor measures, without other processes."""

from __future__ import annotations

import pytest

from dist_train.doctor import probes


def test_a_bandwidth_is_that_of_warm_connections() -> None:
    asked: list[int] = []

    def transfer(size: int) -> float:
        asked.append(size)
        return 3.0 if len(asked) == 1 else size / 1e9

    assert probes._bandwidth(transfer, 1 << 26) == pytest.approx(1.0)
    assert asked[:2] == [1 << 14, 1 << 14]
