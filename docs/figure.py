"""Makes docs/one-curve.svg, the README's figure: `python docs/figure.py`, about a minute on two CPU cores.

The same config is trained on one process, on two, and on four that are killed (SIGKILL, all of them) twice and started again.
The three train losses are drawn over each other, and the largest difference between them is written below.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).with_name("one-curve.svg")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 320, 56, 44, 16, 48
KILLS = (140, 260)  # at these steps, of 380
# name, processes, steps at which all are killed; and the width and color of the line
RUNS = (
    ("one", 1, (), "1 process", 9.0, "#9ecbff"),
    ("two", 2, (), "2 processes", 4.5, "#2f81f7"),
    ("four", 4, KILLS, "4 processes, killed twice", 1.4, "#0b2a5b"),
)


def train(folder: Path, name: str, processes: int, kills: Sequence[int]) -> list[tuple[int, float]]:
    """(step, train loss) of each row of a run that is killed at these steps and started again."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch, "-m", "dist_train.main", "--config", str(ROOT / "configs/digits_mlp.yaml")]
    command += [f"run.name={name}", "trainer.log_every=5step", "tracking.tensorboard=false", "tracking.report=false"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for step in (*kills, None):
        running = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        if step is not None:
            while not any(row[0] >= step for row in rows(folder / "runs" / name)):
                assert running.poll() is None, f"ended before step {step}"
                time.sleep(0.005)
            os.killpg(running.pid, signal.SIGKILL)
        assert running.wait() == (0 if step is None else -signal.SIGKILL)
    return rows(folder / "runs" / name)


def rows(run: Path) -> list[tuple[int, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(row["step"], row["loss"]) for row in found if row["split"] == "train"]


def drawing(curves: Sequence[Sequence[tuple[int, float]]]) -> str:
    """The SVG, readable on light and on dark ground."""
    last, high = curves[0][-1][0], max(loss for curve in curves for _, loss in curve)
    low = min(loss for curve in curves for _, loss in curve)
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + inner * step / last

    def y(loss: float) -> float:
        return TOP + tall * (high - loss) / (high - low)

    parts = []
    for loss in (0.6, 1.0, 1.5, 2.0):
        parts.append(f'<path class="grid" d="M{LEFT} {y(loss):.1f}h{inner}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    for step in range(0, last + 1, 50):
        parts.append(f'<text x="{x(step):.1f}" y="{TOP + tall + 18}" text-anchor="middle">{step}</text>')
    for step in KILLS:
        parts.append(f'<path class="kill" d="M{x(step):.1f} {TOP}v{tall}"/>')
        parts.append(f'<text x="{x(step) + 5:.1f}" y="{TOP + 12}">SIGKILL, started again</text>')
    key = LEFT
    for curve, (*_, text, width, color) in zip(curves, RUNS):
        places = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        look = f'fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round"'
        parts.append(f'<polyline points="{places}" {look}/><path d="M{key} 22h26" {look}/>')
        parts.append(f'<text x="{key + 34}" y="26">{text}</text>')
        key += 60 + 7 * len(text)
    apart = max(abs(a[1] - b[1]) / a[1] for curve in curves[1:] for a, b in zip(curves[0], curve))
    below = (
        f"train loss over steps, all {len(curves[0])} rows of configs/digits_mlp.yaml; they differ by {apart:.0e} of it"
    )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">{below}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">
<style>rect{{fill:#fff}}text{{font:13px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2328}}
.grid{{stroke:#8884}}.kill{{stroke:#cf222e;stroke-dasharray:4 4}}</style>
<rect width="100%" height="100%" rx="8"/>
{"".join(parts)}
</svg>
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curves = [train(Path(folder), name, processes, kills) for name, processes, kills, *_ in RUNS]
    steps = [[step for step, _ in curve] for curve in curves]
    assert steps[0] == steps[1] == steps[2]
    OUT.write_text(drawing(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
