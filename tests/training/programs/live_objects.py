"""Train from Python with live objects in the config."""

import signal

import torch

import dist_train

data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
result = dist_train.train(
    {
        "data": {"train": data, "global_batch_size": 8},
        "model": torch.nn.Linear(3, 1),
        "loss": torch.nn.MSELoss(),
        "optimizer": {"_target_": torch.optim.SGD, "lr": 0.01},
        "trainer": {"duration": "2ep"},
        "run": {"name": "live"},
    }
)
assert (result["state"], result["step"]) == ("completed", 10), result
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a notebook's Ctrl-C works again"
