"""Load whole.pt and state.pt, a small CNN, without dist_train; their outputs must be those in expected.pt."""

import sys

import torch
from torch import nn

expected = torch.load("expected.pt")
whole = torch.load("whole.pt", weights_only=False).eval()
state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
state.load_state_dict(torch.load("state.pt", weights_only=True))
with torch.no_grad():
    for model in (whole, state):
        assert torch.equal(model(expected["inputs"]), expected["outputs"])
assert not [name for name in sys.modules if name.startswith("dist_train")]
