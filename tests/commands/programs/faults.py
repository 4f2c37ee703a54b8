"""Callbacks that make one rank do something wrong in one step, for `compare` to find; and one that kills its process."""

import os
import pathlib
import signal

import torch

from dist_train.callbacks import Callback


def flip(tensor, bit=22):
    """The same with one bit of its first element flipped."""
    flipped = tensor.clone(memory_format=torch.preserve_format)
    flipped.view(torch.int32)[(0,) * flipped.dim()] ^= 1 << bit
    return flipped


class Fault(Callback):
    def __init__(self, step, rank=0, name="classifier.2.weight"):
        self.step, self.rank, self.name = step, rank, name

    def on_start(self, trainer):
        self.parameter = trainer.model.get_parameter(self.name)
        if trainer.world.rank == self.rank:
            self.parameter.register_hook(
                lambda gradient: self.change(gradient) if trainer.step + 1 == self.step else None
            )

    def change(self, gradient):
        """The local gradient that the rank has in that step; None: as it is."""


class FlippedGradient(Fault):
    def change(self, gradient):
        return flip(gradient)


class InfiniteGradient(Fault):
    def change(self, gradient):
        return gradient / 0


class FlippedWeight(Fault):
    def on_step_end(self, trainer):
        if trainer.step == self.step and trainer.world.rank == self.rank:
            with torch.no_grad():
                self.parameter.copy_(flip(self.parameter.detach(), bit=3))


class Killed(Fault):
    def on_step_end(self, trainer):
        if trainer.step == self.step and trainer.world.rank == self.rank and not pathlib.Path("killed").exists():
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
