"""Which parameters train, as plain torch trains them, and which are refused by name before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dist_train
from dist_train.building.model import ModelParts, build_model_parts, check_batchnorm
from dist_train.building.prepare import build_plan
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.objective.precision import Precision, common_precision
from dist_train.optim.ema import EMA
from dist_train.optim.optim import build_optimizer
from dist_train.optim.parameters import check_optimizer, check_parameters, match_strides
from dist_train.runtime.world import Placement, World

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WORDS = torch.randint(0, 9, (24, 5), generator=torch.Generator().manual_seed(0))
LABELS = (WORDS.sum(1) > 20).long()


class Words(nn.Module):
    """Sums of embeddings."""

    def __init__(self, sparse: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.table = nn.Embedding(9, 2, sparse=sparse, dtype=dtype)

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words).sum(1)


class Complex(nn.Module):
    """Amplitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 2, dtype=torch.complex64))

    def forward(self, words: Tensor) -> Tensor:
        return (words.to(torch.complex64) / 9 @ self.weight).abs()


class Gaps(nn.Module):
    """Parameters that are columns of one memory."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(5, 4)
        self.weight, self.other = nn.Parameter(whole[:, :2]), nn.Parameter(whole[:, 2:])

    def forward(self, words: Tensor) -> Tensor:
        return words.float() / 9 @ (self.weight + self.other)


TRAINED = {
    "sparse": (Words, {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}),
    "SparseAdam": (Words, {"_target_": "torch.optim.SparseAdam", "lr": 0.1}),
    "complex": (Complex, {"_target_": "torch.optim.Adam", "lr": 0.1}),
    "bf16": (lambda: Words(False, torch.bfloat16), {"_target_": "torch.optim.AdamW", "lr": 0.1}),
    "gaps": (Gaps, {"_target_": "torch.optim.Adam", "lr": 0.1}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_unusual_parameters_train_as_in_plain_torch(name: str, tmp_path: Path) -> None:
    make, optimizer = TRAINED[name]
    torch.manual_seed(0)
    ours = make()
    torch.manual_seed(0)
    plain = make()
    kind = getattr(torch.optim, optimizer["_target_"].rpartition(".")[2])
    reference = kind(plain.parameters(), **{key: value for key, value in optimizer.items() if key != "_target_"})
    for steps in (2, 3):  # and resumes from its own checkpoint
        dist_train.train(
            {
                "data": {"train": TensorDataset(WORDS, LABELS), "global_batch_size": "all", "shuffle": False},
                "model": ours, "loss": {"_target_": "torch.nn.CrossEntropyLoss"}, "optimizer": optimizer,
                "trainer": {"duration": f"{steps}step", "clip_grad_norm": 0.5}, "run": {"dir": str(tmp_path)},
                "tracking": {"tensorboard": False, "report": False}, "checkpoint": {"every": "1step"},
            }
        )  # fmt: skip
    for _ in range(3):
        reference.zero_grad()
        nn.functional.cross_entropy(plain(WORDS).float(), LABELS).backward()
        grads = [p.grad if p.grad.is_sparse is False else p.grad.coalesce() for p in plain.parameters()]
        values = [grad._values() if grad.is_sparse else grad for grad in grads]
        scale = min(1.0, 0.5 / float(torch.sqrt(sum(v.abs().float().pow(2).sum() for v in values))))
        for p, grad in zip(plain.parameters(), grads, strict=True):
            p.grad = grad * scale
        reference.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        rough = a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2e-2 if rough else 1e-4, atol=1e-2 if rough else 1e-6)


class NeedsLoss(torch.optim.SGD):
    def step(self, loss: Any) -> Any:  # type: ignore[override]
        return super().step()


def expanded() -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1, 3).expand(4, 3))
    return model


def tied_by_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(2)), "0.weight has no shape yet"),
        (lambda: torch.compile(nn.Linear(2, 2), backend="eager"), "trainer.compile=true"),
        (expanded, "weight: elements of it share memory"),
        (tied_by_memory, "0.weight and 1.weight: elements of it share memory"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parameters(make())
    check_parameters(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last), Gaps()))


@pytest.mark.parametrize(
    ("model", "optimizer", "where", "message"),
    [
        (
            nn.Linear(2, 2),
            {"_target_": torch.optim.LBFGS},
            {"scaled": True},
            "LBFGS computes the gradient several times",
        ),
        (
            nn.Linear(2, 2),
            {"_target_": torch.optim.LBFGS},
            {"skips": True},
            "LBFGS computes the gradient several times",
        ),
        (nn.Linear(2, 2), {"_target_": NeedsLoss}, {}, "NeedsLoss.step needs loss, which isn't known here"),
        (Words(), {"_target_": torch.optim.Adam}, {}, "table.weight is sparse, which Adam doesn't take"),
        (Words(), {"_target_": torch.optim.SGD, "weight_decay": 0.1}, {}, "can't decay weights"),
        (nn.Sequential(Words(), nn.Linear(2, 2)), {"_target_": torch.optim.SparseAdam}, {}, "1.weight is dense"),
        (Words(False), {"_target_": torch.optim.SparseAdam}, {}, "use torch.optim.Adam"),
        (Words(), {"_target_": torch.optim.SGD}, {"device": CUDA, "world_size": 2}, "NCCL adds up dense ones only"),
        (Words(False, torch.bfloat16), {"_target_": torch.optim.SGD}, {"scaled": True}, "table.weight is bfloat16"),
        (Gaps(), {"_target_": torch.optim.Adam, "fused": True}, {}, "weight has gaps"),
        (
            nn.Linear(2, 2),
            {"_target_": torch.optim.SGD, "momentum": 0.9, "dampening": 0.1, "fused": True},
            {"device": CUDA, "skips": True},
            "set fused: false",
        ),
    ],
)
def test_optimizers_that_cannot_train_a_model_are_refused(
    model: nn.Module, optimizer: Any, where: Any, message: str
) -> None:
    own = dict(optimizer)
    made = own.pop("_target_")(model.parameters(), **own)
    with pytest.raises(ConfigError, match=message):
        check_optimizer(made, model, **{"device": CPU, "world_size": 1, "skips": False, "scaled": False, **where})


def test_ema_of_half_precision_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="is bfloat16, whose few digits"):
        EMA(Words(False, torch.bfloat16), 0.999)


def test_a_state_saved_with_other_strides_takes_those_of_the_parameters() -> None:
    """channels_last on the GPU, say, and not where the run is resumed: fused kernels would mix up the elements."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3)
        gradient = torch.randn(4, 3, 3, 3)
        saved = build_optimizer({"_target_": "torch.optim.Adam", "lr": 0.1}, conv, CPU)
        conv.weight.grad = gradient
        saved.step()
        state = saved.state_dict()
        state["state"][0] = {
            key: value.to(memory_format=torch.channels_last) if value.dim() else value
            for key, value in state["state"][0].items()
        }
        other = torch.optim.Adam(conv.parameters(), lr=0.1, fused=fused)
        other.load_state_dict(state)
        match_strides(other)
        conv.weight.grad = gradient
        other.step()
        results.append(conv.weight.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


class Ranks:
    """A world in which each rank has one value."""

    def __init__(self, *gathered: list[str]):
        self.gathered, self.device = gathered, CPU

    def all_gather(self, mine: Any) -> list[list[str]]:
        return list(self.gathered)


def test_the_ranks_agree_on_the_least_precision_of_their_devices() -> None:
    mine = Precision("bf16", "cuda")
    assert common_precision(mine, Ranks(["bf16", "A100"], ["bf16", "H100"])) is mine  # type: ignore[arg-type]
    least = common_precision(mine, Ranks(["bf16", "A100"], ["fp16", "V100"], ["bf16", "A100"]))  # type: ignore[arg-type]
    assert least.name == "fp16"
    assert str(least.note).startswith("unequal devices: rank 0 (A100) bf16, rank 1 (V100) fp16")


class Images(nn.Module):
    """A convolution over images, one over volumes, and normalization over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.deep, self.norm = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 2, 3), nn.SyncBatchNorm(4)


def parts(tmp_path: Path, ranks: int, **data: Any) -> ModelParts:
    """Rank 0's parts of a run on so many ranks."""
    config = load_config(
        {
            "data": {"train": TensorDataset(torch.zeros(50, 3), torch.zeros(50)), **data}, "model": Images(),
            "loss": nn.MSELoss(), "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
            "trainer": {"duration": "1ep", "channels_last": True, "micro_batch_size": 4}, "run": {"dir": str(tmp_path)},
        }
    )  # fmt: skip
    return build_model_parts(config, World(Placement(0, ranks), CPU))


def check_batches(tmp_path: Path, size: int, drop_last: bool) -> None:
    """The check of a run on two ranks, in micro-batches of 4."""
    built = parts(tmp_path, 2, global_batch_size=size, drop_last=drop_last)
    check_batchnorm(built, build_plan(built.config.data.train, seed=0, config=built.config.data), min(-(-size // 2), 4))


def test_channels_last_is_for_four_dimensions(tmp_path: Path) -> None:
    model: Any = parts(tmp_path, 1, global_batch_size=8).model
    assert model.flat.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.deep.weight.is_contiguous()


def test_synced_batchnorm_with_unequal_numbers_of_forwards_is_refused(tmp_path: Path) -> None:
    """24 samples leave two for the last step, one a rank, and 8 leave two as well; of 9, one rank gets five and splits them."""
    for size, drop_last in ((8, True), (8, False), (24, False)):
        check_batches(tmp_path, size, drop_last)
    with pytest.raises(ConfigError, match="for a step of 9 samples the 2 ranks run 2, 1 micro-batches of at most 4"):
        check_batches(tmp_path, 9, True)
    with pytest.raises(ConfigError, match="for a step of 1 samples the 2 ranks run 1, 0"):
        check_batches(tmp_path, 7, False)
