"""Exit 1 if the newest run below a directory has failed, or is running but has written nothing for a while; else 0.

python healthcheck.py RUNS [SECONDS]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def verdict(runs: Path, seconds: float) -> tuple[bool, str]:
    """(healthy, why). A directory without runs is healthy: nothing has started yet."""
    statuses = sorted(runs.glob("*/status.json"), key=lambda path: path.stat().st_mtime)
    if not statuses:
        return True, f"no run in {runs} yet"
    run = statuses[-1].parent
    state = json.loads(statuses[-1].read_text())["state"]
    if state != "running":
        return state != "failed", f"{run.name}: {state}"
    alive = max(path.stat().st_mtime for path in run.rglob("*") if path.is_file())
    age = time.time() - alive
    return age <= seconds, f"{run.name}: running, last heartbeat {age:.0f} s ago"


def main() -> int:
    healthy, why = verdict(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 900.0)
    print(why)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
