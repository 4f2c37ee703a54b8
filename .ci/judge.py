"""Judge what the suite says: `judge.py FIRST.xml AGAIN.xml`, JUnit files of pytest, the second where there is one.

A skipped test needs a reason that is expected here. A test that failed and passed the second time fails the check all the
same, unless it is listed below with why.
"""

import os
import sys
import xml.etree.ElementTree as ElementTree

SKIPS = ("needs a CUDA device",)  # this machine has none

# What "module::name" (as printed below) begins with -> why it may need a second try.
FLAKY: dict[str, str] = {
    "tests.launch.test_slurm::": "a real Slurm's own clocks: its daemons poll, and count a minute in seconds of a busy machine",
}


def outcomes(path: str) -> dict[str, tuple[str, str]]:
    """(passed, failed or skipped; its message) of each test of a JUnit file."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag: child.get("message", "") for child in case}
        kind = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = ("failed" if kind in ("failure", "error") else kind, kinds.get(kind, ""))
    return found


def main() -> int:
    """Print what is wrong; how many."""
    first = outcomes(sys.argv[1])
    again = outcomes(sys.argv[2]) if os.path.exists(sys.argv[2]) else {}
    problems = 0
    for name, (kind, message) in first.items():
        if kind == "skipped" and not any(reason in message for reason in SKIPS):
            problems += 1
            print(f"skipped without an expected reason: {name}: {message}")
        if kind == "failed":
            second = again.get(name, ("not run", ""))[0]
            listed = (why for beginning, why in FLAKY.items() if name.startswith(beginning))
            excuse = next(listed, None) if second == "passed" else None
            problems += excuse is None
            print(f"failed, then {second}: {name}" + (f" (listed: {excuse})" if excuse else ""))
    if not first:
        problems += 1
        print("no test ran")
    return min(problems, 1)


if __name__ == "__main__":
    sys.exit(main())
