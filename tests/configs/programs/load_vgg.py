"""Load whole.pt and model.pt, a VGG of two classes, without dist_train; they must agree."""

import sys

import torch
import torchvision

whole = torch.load("whole.pt", weights_only=False)
plain = torchvision.models.vgg16(num_classes=2)
plain.load_state_dict(torch.load("model.pt", weights_only=True))
with torch.no_grad():
    one, two = (model.eval()(torch.ones(1, 3, 32, 32)) for model in (whole, plain))
assert one.shape == (1, 2)
assert torch.equal(one, two)
assert not [name for name in sys.modules if name.startswith("dist_train")]
