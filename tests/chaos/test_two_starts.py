"""Two jobs that are started at the same moment: one trains, the other waits or is refused, and each row stands once."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from killing import ONE, prepare
from runs import rows, start

PAIRS = 20


@pytest.mark.chaos
def test_of_two_that_start_at_once_one_trains(tmp_path: Path) -> None:
    prepare(tmp_path)
    late = random.Random(0)
    for pair in range(PAIRS):
        options = (*ONE, f"run.name=pair{pair}", "trainer.duration=6step")
        first = start(tmp_path, 1, *options)
        time.sleep(late.uniform(0, 3.5))  # from at once to when the first one has ended
        second = start(tmp_path, 1, *options)
        ends = [(*job.communicate(timeout=120), job.returncode) for job in (first, second)]
        place = tmp_path / "runs" / f"pair{pair}"
        assert sorted(code for *_, code in ends) in ([0, 0], [0, 2]), ends
        assert all("is being trained by process" in err for _, err, code in ends if code == 2), ends
        assert all("Traceback" not in err for _, err, _ in ends), ends
        assert json.loads((place / "status.json").read_text())["state"] == "completed"
        found = [(row["split"], row["step"]) for row in rows(place)]
        assert len(found) == len(set(found)), found
        events = [json.loads(line)["event"] for line in (place / "attempts.jsonl").read_text().splitlines()]
        assert events == ["start", "end"], ends
