"""A task whose predictions fail on rank 1."""

import torch.distributed as dist
from torch import nn

from dist_train.task.losses import Loss
from dist_train.task.task import Supervised


class Mute(Supervised):
    def __init__(self):
        super().__init__(Loss(nn.CrossEntropyLoss()))

    def predict(self, model, batch):
        if dist.get_rank() == 1:  # the other one must not wait for it for ever
            raise LookupError("nothing to say")
        return super().predict(model, batch)
