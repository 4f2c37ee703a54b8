"""`generate`: the tokens that a loop by hand finds, draws as torch's softmax has them, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train.models import GPT
from dist_train.tasks import generate


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    found = GPT(vocabulary=12, length=8, width=16, heads=2, dropout=0.3)
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.5)
    return found


STARTS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_takes_the_most_likely_token_of_each_sequence_alone(model: nn.Module) -> None:
    found = generate(model, STARTS, 5, temperature=0)
    assert found.shape == (2, 8)
    assert model.training, "its mode isn't as it was"
    model.eval()
    for row, start in zip(found, STARTS, strict=True):
        tokens = start.tolist()
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert row.tolist() == tokens
    model.train()


def test_draws_are_as_the_softmax_of_the_k_best(model: nn.Module) -> None:
    many = STARTS[:1].expand(20_000, -1)
    drawn = generate(model, many, 1, temperature=0.7, top_k=4, seed=0)[:, -1]
    with torch.no_grad():
        logits = model.eval()(STARTS[:1])[0, -1] / 0.7
    model.train()
    best = logits.topk(4).indices
    expected = torch.full((12,), float("-inf")).scatter(0, best, logits[best]).softmax(0)
    shares = torch.bincount(drawn, minlength=12) / 20_000
    assert set(drawn.tolist()) == set(best.tolist())
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)


def test_a_seed_gives_the_same_tokens_and_leaves_torchs_generator_alone(model: nn.Module) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    runs = [generate(model, STARTS.repeat(8, 1), 5, seed=seed) for seed in (7, 7, 8)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_context_lets_it_go_on_beyond_the_models_length(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="at most 8 tokens, found 9"):
        generate(model, STARTS, 7, temperature=0)
    found = generate(model, STARTS, 12, temperature=0, context=8)
    assert torch.equal(found[:, :8], generate(model, STARTS, 5, temperature=0))
    last = generate(model, found[:, -9:-1], 1, temperature=0)
    assert torch.equal(last[:, -1], found[:, -1])


def test_a_sequence_that_has_stopped_stays_stopped(model: nn.Module) -> None:
    free = generate(model, STARTS, 5, temperature=0)
    stop = int(free[0, 3])
    found = generate(model, STARTS[:1], 5, temperature=0, stop=stop)
    assert found.tolist() == [[1, 2, 3, stop]]
    both = generate(model, STARTS, 5, temperature=0, stop=stop)
    assert set(both[0, 3:].tolist()) == {stop}
    assert both[1, 3] == free[1, 3]


class LastOnly(nn.Module):
    """As nanoGPT's without targets: (logits of the last token, no loss)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        return self.inner(tokens)[:, [-1]], None


def test_logits_of_the_last_token_alone_will_do(model: nn.Module) -> None:
    assert torch.equal(generate(LastOnly(model), STARTS, 4, temperature=0), generate(model, STARTS, 4, temperature=0))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (STARTS.float(), {}, "tokens as int64"),
        (STARTS[0], {}, r"found torch.int64 \(3,\)"),
        (STARTS, {"top_k": 0}, "top_k to be at least 1, found 0"),
        (STARTS, {"temperature": -1.0}, "temperature to be at least 0, found -1"),
    ],
)
def test_wrong_arguments_are_named(model: nn.Module, tokens: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, 1, **options)  # type: ignore[arg-type]


def test_a_model_of_vectors_is_no_language_model() -> None:
    with pytest.raises(ValueError, match=r"expects logits \(N, T, vocabulary\)"):
        generate(nn.Sequential(nn.Embedding(12, 4), nn.Flatten()), STARTS, 1)
