"""Knowledge distillation from a frozen teacher."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.config.errors import ConfigError
from dist_train.library.language import logits_of
from dist_train.models.transfer import load_weights
from dist_train.models.weights import read_file
from dist_train.task.batch import call_model, in_full_precision, is_pair, split_batch
from dist_train.task.task import full_precision
from dist_train.task.terms import StepOutput

NO_CLASS = -(2**31)  # an ignored label would count in the mean: it is out of range here


class Distillation(nn.Module):
    """A student learns a teacher's softened probabilities beside the labels (Hinton, Vinyals & Dean 2015):

    loss = (1 - soft) * CE(y, student) + soft * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    The two are the named losses `hard` and `soft` (the latter with T^2), means over samples. A batch is (inputs, labels (N,));
    both models give logits (N, classes), also as an object with `logits`. The outputs for metrics are the student's logits and
    the labels.

    The teacher runs in eval mode without gradients, and is no part of checkpoints or of model.pt: they hold the SHA-256 of its
    weights, and a run that resumes with other weights is refused.

    Args:
        teacher: a module, in a config `{_target_: ..., its arguments}`.
        weights: a file with its state_dict (torch.save, safetensors; a run's model.pt); None: it has its weights already.
        temperature: T.
        soft: the share of the teacher's loss, from 0 to 1.
    """

    classes_dim = 1  # of what `predict` returns: see `evaluation.meaning`

    def __init__(self, teacher: nn.Module, weights: str | None = None, temperature: float = 4.0, soft: float = 0.9):
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"Distillation: expected a torch.nn.Module as teacher, found {type(teacher).__name__}")
        if temperature <= 0 or not 0 <= soft <= 1:
            raise ValueError(
                f"Distillation: expected a temperature above 0 and soft from 0 to 1, found {temperature} and {soft}"
            )
        if weights is not None:
            try:
                load_weights(teacher, read_file(weights), weights)
            except ConfigError as error:
                raise ConfigError.single("task.weights", error.problems[0].message) from None
        self.temperature, self.share = temperature, soft
        self._teacher = Frozen(teacher)
        self.teacher_sha256: Tensor
        self.register_buffer("teacher_sha256", self._teacher.sha256())

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Both losses, summed over samples.

        Raises:
            ValueError: the teacher isn't the one that the run began with, or gives other classes than the student; a label of the
                first batch is negative.
        """
        inputs, labels = split_batch(batch)
        if not self._teacher.verified and not labels.is_floating_point() and labels.numel() and int(labels.min()) < 0:
            raise ValueError(
                f"Distillation: expected a class from 0 for each sample, found the label {int(labels.min())}: both losses are "
                "means over all samples, so leave out those without a label"
            )
        self._teacher.verify(self.teacher_sha256)
        logits = logits_of(call_model(model, inputs))
        with torch.no_grad():
            taught = logits_of(self._teacher(inputs, logits.device))
        if taught.shape != logits.shape:
            raise ValueError(
                f"Distillation: the teacher gives {tuple(taught.shape)} and the student {tuple(logits.shape)}: expected "
                "logits of the same classes"
            )
        with full_precision(logits):
            student, teacher = in_full_precision([logits, taught])
            hard = functional.cross_entropy(student, labels, ignore_index=NO_CLASS, reduction="sum")
            q, p = (functional.log_softmax(part / self.temperature, 1) for part in (student, teacher))
            soft = functional.kl_div(q, p, reduction="sum", log_target=True) * self.temperature**2
        count = len(logits)
        losses = {"hard": (hard, count, 1.0 - self.share), "soft": (soft, count, self.share)}
        return StepOutput(losses, count, logits, labels)

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """The student's logits (N, classes)."""
        return logits_of(call_model(model, batch[0] if is_pair(batch) else batch))


class Frozen:
    """A module that is used and not trained: no part of the task's parameters and state, nor of `modules_in`.

    Attributes:
        verified: `verify` has been called.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)
        self._device: torch.device | None = None
        self.verified = False

    def __call__(self, inputs: Any, device: torch.device) -> Any:
        """Its outputs, in eval mode, on a device."""
        if self._device != device:
            self.module.to(device)
            self._device = device
        return call_model(self.module, inputs)

    def verify(self, sha256: Tensor) -> None:
        """Raises ValueError: its weights aren't those of `sha256`, which a checkpoint may have brought; looks once."""
        if not self.verified and not torch.equal(sha256.cpu(), self.sha256()):
            raise ValueError(
                "Distillation: the teacher's weights aren't those that this run began with: give the `teacher` and `weights` of "
                "then, or begin another run by another run.name"
            )
        self.verified = True

    def sha256(self) -> Tensor:
        """Of names, dtypes, shapes and bytes of its state_dict: uint8 (32,)."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
