"""Text of a language model that brings no `generate` of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.library.language import logits_of
from dist_train.models.layers import evaluating


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    context: int | None = None,
    seed: int | None = None,
    stop: int | None = None,
) -> Tensor:
    """Continue sequences token by token, by a module that maps tokens (N, T) to logits (N, T, vocabulary).

    The logits may also be the entry `logits` of its output or the first of a tuple; of one that gives those of the last token
    alone (nanoGPT's without targets) these are taken. The module is in eval mode meanwhile. No keys and values are cached: each
    token costs a forward over the sequence. Models of transformers and peft have a `generate` of their own, with a cache and
    beams: `dist_train.load(run).generate(...)`.

    Args:
        tokens: int64 (N, T), T of at least 1; all sequences of one length, without padding.
        count: how many to add at most.
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: draw among the k most likely ones only; None: among all.
        context: how many of the last tokens the model sees; None: all. A model with learned positions fails beyond its own limit.
        seed: of the draws, which don't touch torch's own generator; the same seed gives the same tokens. None: a random one.
        stop: a sequence that has got this token gets no other; generation ends once all have.

    Returns:
        int64 (N, T + n), n <= `count`, on the device of `tokens`: the given tokens and those that follow.

    Raises:
        ValueError: an argument is out of its range, or the model gives no logits for sequences.
    """
    if tokens.dim() != 2 or not tokens.numel() or tokens.dtype != torch.int64:
        raise ValueError(f"generate expects tokens as int64 (N, T), found {tokens.dtype} {tuple(tokens.shape)}")
    for name, value, least in (
        ("count", count, 0),
        ("temperature", temperature, 0),
        ("top_k", top_k, 1),
        ("context", context, 1),
    ):
        if value is not None and not value >= least:
            raise ValueError(f"generate expects {name} to be at least {least}, found {value}")
    draws = torch.Generator(tokens.device)
    draws.seed() if seed is None else draws.manual_seed(seed)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with evaluating(model):
        for _ in range(count):
            logits = _last_logits(model, tokens if context is None else tokens[:, -context:])
            following = _chosen(logits, temperature, top_k, draws)
            if stop is not None:
                following = following.masked_fill(done, stop)
                done |= following == stop
            tokens = torch.cat([tokens, following[:, None]], dim=1)
            if stop is not None and bool(done.all()):
                break
    return tokens


def _last_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(N, vocabulary) of the next token, float32."""
    logits = logits_of(model(tokens))
    if logits.dim() != 3 or len(logits) != len(tokens) or logits.shape[1] not in (1, tokens.shape[1]):
        found = f"of tokens {tuple(tokens.shape)} the model gave {tuple(logits.shape)}"
        raise ValueError(f"generate expects logits (N, T, vocabulary), but {found}")
    return logits[:, -1].float()


def _chosen(logits: Tensor, temperature: float, top_k: int | None, draws: torch.Generator) -> Tensor:
    """The next token of each sequence, (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        best, where = logits.topk(top_k)
        return where.gather(1, torch.multinomial((best / temperature).softmax(-1), 1, generator=draws))[:, 0]
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws)[:, 0]
