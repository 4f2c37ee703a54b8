"""Generative models: variational autoencoders and generative adversarial networks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.task.batch import call_model, in_full_precision, shapes_of
from dist_train.task.task import full_precision
from dist_train.task.terms import StepOutput


def _inputs(batch: Any) -> Tensor:
    """Those of (inputs, labels) or (inputs,), or the batch itself.

    Raises:
        TypeError: they aren't one tensor.
    """
    inputs = batch[0] if isinstance(batch, list | tuple) and len(batch) in (1, 2) else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"expected a batch of samples, or (samples, labels), the samples as one tensor, found {shapes_of(batch)}; of samples "
            "with names set data.inputs and data.target"
        )
    return inputs


class VAE:
    """The negative evidence lower bound of an autoencoder whose code is Gaussian, per sample (Kingma & Welling 2014):

    loss = reconstruction + beta * kl, with reconstruction = -log p(x | z), summed over the elements of a sample, and
    kl = -1/2 * sum(1 + log var - mean^2 - var) against a standard normal distribution (beta: Higgins et al. 2017). Both are named
    losses.

    A batch is inputs or (inputs, labels); labels aren't used. The model gives (reconstruction, mean, log_variance): the first of
    the inputs' shape, the others (N, z). The outputs for metrics are the reconstructions and the inputs; `predict` gives the
    reconstructions. The report shows these at the end of the run, and of a model with a `decoder` samples from the prior over
    time.

    Args:
        likelihood: `gaussian` of variance 1: half the squared error, without its constant; or `bernoulli` for inputs in [0, 1]:
            binary cross-entropy, of a model that gives logits.
        beta: the weight of kl.
    """

    gives_images = True  # the report shows those of each evaluation, see docs/your-own.md

    def __init__(self, likelihood: str = "gaussian", beta: float = 1.0):
        if likelihood not in ("gaussian", "bernoulli"):
            raise ValueError(f"VAE: expected likelihood to be gaussian or bernoulli, found {likelihood!r}")
        self.likelihood, self.beta = likelihood, beta

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Both losses, summed over samples.

        Raises:
            ValueError, TypeError: the model doesn't give what is expected.
        """
        inputs = _inputs(batch)
        raw, mean, log_variance = self._outputs(call_model(model, inputs))
        if raw.shape != inputs.shape:
            raise ValueError(
                f"VAE: expected a reconstruction of the inputs' shape {tuple(inputs.shape)}, found {shapes_of(raw)}"
            )
        with full_precision(raw):
            raw, mean, log_variance = in_full_precision([raw, mean, log_variance])
            if self.likelihood == "gaussian":
                reconstruction = functional.mse_loss(raw, inputs.to(raw), reduction="sum") / 2
            else:
                reconstruction = functional.binary_cross_entropy_with_logits(raw, inputs.to(raw), reduction="sum")
            kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        losses = {"reconstruction": reconstruction, "kl": (kl, len(inputs), self.beta)}
        return StepOutput(losses, len(inputs), self._shown(raw), inputs)

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """Reconstructions, of the inputs' shape; with `bernoulli` as probabilities."""
        return self._shown(self._outputs(call_model(model, _inputs(batch)))[0])

    def generated(self, model: nn.Module, batch: Any) -> Tensor | None:
        """As many samples from the prior as a batch has, of a model with a `decoder` (N, z) -> (N, ...); None without one."""
        inputs, decoder = _inputs(batch), getattr(model, "decoder", None)
        code = torch.randn_like(self._outputs(call_model(model, inputs))[1])
        with contextlib.suppress(Exception):  # one of that name that takes something else
            raw = decoder(code) if callable(decoder) else None
            if isinstance(raw, Tensor) and raw.shape == inputs.shape:
                return self._shown(raw)
        return None

    def _shown(self, raw: Tensor) -> Tensor:
        return raw.sigmoid() if self.likelihood == "bernoulli" else raw

    def _outputs(self, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        if (
            isinstance(outputs, tuple | list)
            and len(outputs) == 3
            and all(isinstance(part, Tensor) for part in outputs)
        ):
            return outputs[0], outputs[1], outputs[2]
        raise TypeError(
            f"VAE expects that the model gives (reconstruction, mean, log_variance), found {shapes_of(outputs)}"
        )


class GAN:
    """Two networks, each with an optimizer of its name: `discriminator` and `generator`.

    With D the discriminator's output for a sample (a logit, or the critic's value), x real, g = generator(z), z standard normal:

    - `non_saturating` (Goodfellow et al. 2014): D minimizes softplus(-D(x)) + softplus(D(g)), G minimizes softplus(-D(g));
    - `hinge` (Lim & Ye 2017): relu(1 - D(x)) + relu(1 + D(g)), and -D(g);
    - `wgan` (Arjovsky et al. 2017): -D(x) + D(g), and -D(g); the gradient penalty (Gulrajani et al. 2017) keeps D Lipschitz.

    A batch is real samples or (real, labels); labels aren't used. The model has two modules, `generator` (N, latent) -> samples
    and `discriminator`, samples -> (N,) or (N, 1). In a config:
    `optimizer: {discriminator: {_target_: ..., match: 'discriminator.*'}, generator: {_target_: ...}}`. The rows have
    `loss/discriminator` with its parts `/real`, `/fake` and `/penalty`, and `loss/generator`. A step of the run is a step of the
    discriminator, and after each `critic_steps`-th also of the generator on the same batch. The outputs for metrics are as many
    generated samples as there are real ones, which are the targets; `predict` gives generated samples, one for each of the batch.

    Args:
        latent: the size of z.
        loss: one of the three above.
        critic_steps: steps of the discriminator for one of the generator; 5 in the papers on WGAN.
        gradient_penalty: weight of (|gradient of D| - 1)^2 between real and generated samples; None: 10 for wgan, else 0.
    """

    gives_images = True

    def __init__(
        self,
        latent: int,
        loss: str = "non_saturating",
        critic_steps: int = 1,
        gradient_penalty: float | None = None,
    ):
        if loss not in ("non_saturating", "hinge", "wgan"):
            raise ValueError(f"GAN: expected loss to be non_saturating, hinge or wgan, found {loss!r}")
        if critic_steps < 1 or latent < 1:
            raise ValueError(f"GAN: expected latent and critic_steps of at least 1, found {latent} and {critic_steps}")
        self.latent, self.kind, self.critic_steps = latent, loss, critic_steps
        default = 10.0 if loss == "wgan" else 0.0
        self.gradient_penalty = default if gradient_penalty is None else gradient_penalty

    def moves(self, step: int) -> list[str]:
        """The optimizers that move in a step (from 0)."""
        return ["discriminator", "generator"] if (step + 1) % self.critic_steps == 0 else ["discriminator"]

    def step(self, model: Any, batch: Any, optimizer: str) -> StepOutput:
        """What `optimizer` minimizes, summed over samples.

        Raises:
            ValueError: there is another optimizer, or the discriminator doesn't give one number for each sample.
        """
        real = _inputs(batch)
        if optimizer == "generator":
            fake = self._generated(model, real)
            return StepOutput(self._generators(_scores(model, fake)).sum(), len(real), fake, real)
        if optimizer != "discriminator":
            raise ValueError(
                f"GAN has two optimizers, discriminator and generator, found {optimizer}: name them so in `optimizer`"
            )
        with torch.no_grad():
            fake = self._generated(model, real)
        of_real, of_fake = self._discriminators(_scores(model, real), _scores(model, fake))
        losses = {"real": of_real.sum(), "fake": of_fake.sum()}
        if self.gradient_penalty and torch.is_grad_enabled():
            penalty = _gradient_penalty(model, real, fake)
            losses["penalty"] = (penalty, len(real), self.gradient_penalty)  # type: ignore[assignment]
        return StepOutput(losses, len(real), fake, real)

    def predict(self, model: Any, batch: Any) -> Tensor:
        """Generated samples, one for each sample of the batch."""
        return self._generated(model, _inputs(batch))

    def _generated(self, model: Any, real: Tensor) -> Tensor:
        dtype = real.dtype if real.is_floating_point() else None
        return model.generator(torch.randn(len(real), self.latent, device=real.device, dtype=dtype))

    def _discriminators(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "non_saturating":
            return functional.softplus(-real), functional.softplus(fake)
        return (functional.relu(1 - real), functional.relu(1 + fake)) if self.kind == "hinge" else (-real, fake)

    def _generators(self, fake: Tensor) -> Tensor:
        return functional.softplus(-fake) if self.kind == "non_saturating" else -fake


def _scores(model: Any, samples: Tensor) -> Tensor:
    """(N,) in full precision."""
    scores = model.discriminator(samples)
    if not isinstance(scores, Tensor) or scores.numel() != len(samples):
        raise ValueError(
            f"GAN: expected one number from the discriminator for each of {len(samples)} samples, found {shapes_of(scores)}"
        )
    return in_full_precision(scores.reshape(-1))


def _gradient_penalty(model: Any, real: Tensor, fake: Tensor) -> Tensor:
    """The sum over samples, at random points between real and generated ones, in float32."""
    with full_precision(real):
        share = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
        between = in_full_precision(share * real + (1 - share) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(_scores(model, between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().sum()
