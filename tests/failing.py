"""The config of runs whose code fails in a chosen way (tests/failures/faulty.py)."""

from __future__ import annotations

from runs import CONFIGS

CONFIG = f"""
extends: {CONFIGS / "digits.yaml"}
run: {{name: run}}
data: {{train: {{_target_: faulty.Data, split: train}}, num_workers: 0, augment: [], eval_batch_size: 90}}
model: {{_target_: faulty.Model, in_features: 64, hidden: [32], out_features: 10}}
loss: {{_target_: faulty.Loss}}
optimizer: {{_target_: faulty.Optimizer, lr: 0.1}}
scheduler: null
callbacks: [{{_target_: faulty.Watch}}]
trainer: {{duration: 60step, log_every: 10step, evaluate_every: 19step}}
checkpoint: {{every: 15step, keep_best: null}}
tracking: {{tensorboard: false}}
"""
