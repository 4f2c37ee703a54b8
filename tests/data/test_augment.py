from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train.data import (
    ColorJitter,
    CutMix,
    Cutout,
    DataError,
    Digits,
    Draws,
    Mixup,
    OneOf,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
    TrivialAugmentWide,
)
from dist_train.data.augment import Augment, Augmentation, Domain, sample_keys
from dist_train.data.plan import Plan

CPU = torch.device("cpu")
COLOR = torch.rand(50, 3, 9, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 10
KINDS: dict[str, list[Augment]] = {
    "shift": [RandomShift(2)],
    "flip": [RandomHorizontalFlip()],
    "erase": [RandomErasing(p=0.7)],
    "mixup": [Mixup(10, alpha=0.4, p=0.8)],
    "cutmix": [CutMix(10)],
    "one": [OneOf([Mixup(10), CutMix(10), RandomHorizontalFlip(1.0)])],
    "all": [RandomShift(2), RandomHorizontalFlip(), OneOf([Mixup(10), CutMix(10)]), RandomErasing(), Mixup(10, p=0.3)],
    "crop": [RandomCrop((8, 10), padding=2), RandomVerticalFlip(0.4), Cutout(5, p=0.8)],
    "resized crop": [RandomResizedCrop(7)],
    "color": [ColorJitter(0.4, 0.4, 0.4, 0.1)],
    "trivial": [TrivialAugmentWide()],
}


def augmented(augments: list[Augment], indices: Any, epoch: int = 3, seed: int = 1, device: torch.device = CPU) -> Any:
    rows = torch.as_tensor(indices)
    batch = (COLOR[rows].to(device), LABELS[rows].to(device))
    return Augmentation(augments)(batch, seed=seed, epoch=epoch, indices=np.asarray(indices))


def over_ranks(augments: list[Augment], world_size: int, micro: int) -> tuple[Tensor, Tensor]:
    """A global batch of 20, as it is augmented on `world_size` ranks in micro-batches."""
    plan = Plan(0, 50, 20)
    k = Augmentation(augments).neighbours
    made = [
        augmented(augments, request.indices)
        for rank in range(world_size)
        for request in plan.micro_batches(1, rank, world_size, micro, k)
    ]
    return torch.cat([inputs for inputs, _ in made]), torch.cat([targets for _, targets in made])


@pytest.mark.parametrize("kind", KINDS)
def test_a_global_batch_is_augmented_the_same_however_it_is_split(kind: str) -> None:
    inputs, targets = over_ranks(KINDS[kind], 1, 20)
    assert len(inputs) == len(targets) == 20
    for world_size, micro in [(1, 7), (2, 20), (3, 4), (7, 2), (20, 1)]:
        again = over_ranks(KINDS[kind], world_size, micro)
        assert again[0].equal(inputs)
        assert again[1].equal(targets)


@pytest.mark.parametrize("kind", KINDS)
def test_another_epoch_or_seed_augments_otherwise(kind: str) -> None:
    indices = list(range(20))
    inputs, _ = augmented(KINDS[kind], indices)
    assert not augmented(KINDS[kind], indices, epoch=4)[0].equal(inputs)
    assert not augmented(KINDS[kind], indices, seed=2)[0].equal(inputs)
    assert augmented(KINDS[kind], indices)[0].equal(inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_leaves_the_global_generator_and_its_inputs_alone(kind: str) -> None:
    before, images = torch.get_rng_state(), COLOR.clone()
    augmented(KINDS[kind], list(range(50)))
    assert torch.get_rng_state().equal(before)
    assert COLOR.equal(images)


def test_numbers_drawn_on_the_host_and_by_torch_are_bitwise_identical() -> None:
    keys = sample_keys(3, 2**40, np.array([0, 5, 2**40]))
    for op in (0, 7):
        host, device = Draws(keys, op, CPU), Draws(keys, op, CPU)
        for n in (1, 5, 300):
            assert host.host(n).equal(device.uniform(n))


def test_draws_are_uniform_and_differ_between_samples_places_and_augmentations() -> None:
    keys = sample_keys(0, 0, np.arange(4000))
    values = torch.cat([Draws(keys, op, CPU).host(3) for op in (0, 1)], dim=1)
    assert values.min() >= 0
    assert values.max() < 1
    assert (values.mean(dim=0) - 0.5).abs().max() < 0.02
    assert (values.var(dim=0) - 1 / 12).abs().max() < 0.005
    columns = torch.cat([values, values.roll(1, 0)], dim=1)
    assert (torch.corrcoef(columns.T) - torch.eye(12)).abs().max() < 0.06


def test_a_shift_moves_whole_images_by_every_offset_equally_often_and_fills_with_zeros() -> None:
    images = torch.zeros(4500, 1, 5, 6)
    images[:, 0, 2, 3] = 1.0
    out, _ = Augmentation([RandomShift(1)])((images, torch.zeros(4500)), seed=0, epoch=0, indices=np.arange(4500))
    assert (out.sum(dim=(1, 2, 3)) == 1).all()
    places = out.sum(dim=(0, 1))
    assert (places > 0).sum() == 9
    assert (places[1:4, 2:5] - 500).abs().max() < 90
    ramp = torch.arange(30.0).view(1, 1, 5, 6).repeat(50, 1, 1, 1) + 1
    shifted, _ = Augmentation([RandomShift(1)])((ramp, torch.zeros(50)), seed=0, epoch=0, indices=np.arange(50))
    for image in shifted[:, 0]:
        assert any(
            image.equal(torch.nn.functional.pad(ramp[0, 0], [1] * 4)[y : y + 5, x : x + 6])
            for y in range(3)
            for x in range(3)
        )


def test_a_flip_mirrors_about_the_share_that_was_asked_for() -> None:
    out, targets = augmented([RandomHorizontalFlip(1.0)], list(range(50)))
    assert out.equal(COLOR.flip(3))
    assert targets.equal(LABELS)
    assert augmented([RandomHorizontalFlip(0.0)], list(range(50)))[0].equal(COLOR)
    images = torch.tensor([[[[0.0, 1.0]]]]).repeat(4000, 1, 1, 1)
    out, _ = Augmentation([RandomHorizontalFlip(0.3)])((images, images), seed=0, epoch=0, indices=np.arange(4000))
    assert abs(out[:, 0, 0, 0].mean().item() - 0.3) < 0.03


def test_erasing_writes_one_box_of_the_asked_size_in_all_channels() -> None:
    images = torch.ones(500, 2, 32, 32)
    out, _ = Augmentation([RandomErasing(1.0, scale=(0.1, 0.2), value=-1)])(
        (images, images), seed=0, epoch=0, indices=np.arange(500)
    )
    erased = out == -1
    assert ((out == 1) | erased).all()
    assert erased[:, 0].equal(erased[:, 1])
    for mask in erased[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert mask.sum() == box
        assert 0.07 < box / 1024 < 0.24


def test_mixup_blends_each_sample_with_the_next_and_its_target_alike() -> None:
    inputs, targets = augmented([Mixup(10, alpha=1.0)], list(range(21)))
    assert inputs.shape == (20, 3, 9, 12)
    assert targets.shape == (20, 10)
    for i in range(20):
        kept = targets[i, LABELS[i]]
        assert torch.allclose(inputs[i], COLOR[i] * kept + COLOR[i + 1] * (1 - kept))
    assert torch.allclose(targets.sum(1), torch.ones(20))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_blending_weights_follow_the_beta_distribution(alpha: float) -> None:
    labels = torch.zeros(20001, dtype=torch.long)
    labels[1::2] = 1
    _, targets = Augmentation([Mixup(2, alpha=alpha)])(
        (torch.zeros(20001, 1), labels), seed=0, epoch=0, indices=np.arange(20001)
    )
    kept = targets[torch.arange(20000), labels[:-1]].double()
    assert abs(kept.mean().item() - 0.5) < 0.01
    assert abs(kept.var().item() - 1 / (4 * (2 * alpha + 1))) < 0.005


def test_cutmix_pastes_a_box_and_mixes_targets_by_its_true_area() -> None:
    inputs, targets = augmented([CutMix(10)], list(range(41)))
    for i in range(40):
        kept = (inputs[i] == COLOR[i]).all(0)
        assert (inputs[i] == torch.where(kept, COLOR[i], COLOR[i + 1])).all()
        assert abs(kept.float().mean() - targets[i, LABELS[i]]) < 1e-6


def test_one_of_applies_exactly_one_to_each_sample() -> None:
    batch = (COLOR[:40], LABELS[:40])
    choice = OneOf([RandomHorizontalFlip(1.0), RandomErasing(1.0, value=7.0)])
    out, targets = Augmentation([choice])(batch, seed=0, epoch=0, indices=np.arange(40))
    flipped = [bool(out[i].equal(COLOR[i].flip(2))) for i in range(40)]
    erased = [bool((out[i] == 7).any()) for i in range(40)]
    assert all(a != b for a, b in zip(flipped, erased))
    assert 8 < sum(flipped) < 32
    assert targets.equal(LABELS[:40])


def test_integer_images_keep_their_type() -> None:
    images = (COLOR * 255).byte()
    out, _ = Augmentation([RandomShift(1), RandomHorizontalFlip(), RandomErasing(), CutMix(10)])(
        (images, LABELS), seed=0, epoch=0, indices=np.arange(50)
    )
    assert out.dtype == torch.uint8


def test_the_memory_layout_of_images_is_kept() -> None:
    images = COLOR.to(memory_format=torch.channels_last)
    for kind, augments in KINDS.items():
        out, _ = Augmentation(augments)((images, LABELS), seed=0, epoch=0, indices=np.arange(50))
        assert out.is_contiguous(memory_format=torch.channels_last), kind
        expected, _ = Augmentation(augments)((COLOR, LABELS), seed=0, epoch=0, indices=np.arange(50))
        assert out.equal(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomShift(-1), "pixels >= 0"),
        (lambda: RandomHorizontalFlip(1.5), "p between 0 and 1"),
        (lambda: RandomErasing(scale=(0.5, 0.2)), "increasing ranges"),
        (lambda: Mixup(10, alpha=0.0), "alpha > 0"),
        (lambda: OneOf([]), "at least one"),
        (lambda: augmented([Mixup(10)], [0, 1]) and Mixup(10)((COLOR * 9).long(), LABELS, None), "floating point"),
        (lambda: Augmentation([RandomShift(1)])(COLOR, seed=0, epoch=0, indices=np.arange(50)), "inputs, targets"),
    ],
)
def test_what_does_not_fit_is_reported(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_flat_inputs_are_refused_by_image_augmentations_with_their_shape() -> None:
    digits = Digits("val", flat=True)
    with pytest.raises(DataError, match=r"RandomShift needs images \(N, C, H, W\), found a batch of shape \(4, 64\)"):
        Augmentation([RandomShift(1)])(digits.read_batch(np.arange(4)), seed=0, epoch=0, indices=np.arange(4))


@pytest.mark.parametrize("kind", ["torchvision", "numpy", "inputs", "draws", "member"])
def test_a_librarys_own_augmentation_draws_the_same_whatever_ran_before(kind: str) -> None:
    def by_numpy(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs * np.random.rand() + random.random(), targets

    def of_inputs(inputs: Tensor) -> Tensor:
        return inputs + torch.rand(inputs.shape)

    def with_draws(inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        return inputs + draws.uniform(1).view(-1, 1, 1, 1) * np.random.rand(), targets

    if kind == "torchvision":
        from torchvision.transforms.v2 import MixUp

        augment: Any = MixUp(num_classes=10)
    elif kind == "member":

        class Noise(Augment):
            def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
                return of_inputs(inputs), targets

        augment = OneOf([Noise(), Noise()])
    else:
        augment = {"numpy": by_numpy, "inputs": of_inputs, "draws": with_draws}[kind]
    batch = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4)

    def run(first: int) -> tuple[Tensor, Tensor]:
        return Augmentation([augment])(batch, seed=1, epoch=2, indices=np.arange(first, first + 4))

    before = run(8)
    torch.rand(3), np.random.rand(3), random.random()
    for one, other in zip(before, run(8), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(run(12)[0], before[0])
    assert not torch.equal(batch[0], before[0])


class Recorded(Augment):
    """Notes what it was given, and leaves it as it is."""

    def __init__(self, domain: Domain, seen: list[str]) -> None:
        self.domain, self.seen = domain, seen

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        self.seen.append(f"{self.domain}:{inputs.dtype}".replace("torch.", ""))
        return inputs, targets


@pytest.mark.parametrize(
    ("domains", "seen"),
    [
        ([], []),
        (["any"], ["any:uint8"]),
        (["any", "pixels", "any"], ["any:uint8", "pixels:uint8", "any:uint8"]),
        (["pixels", "any", "floats", "any"], ["pixels:uint8", "any:uint8", "floats:float32", "any:float32"]),
        (["floats", "floats"], ["floats:float32", "floats:float32"]),
    ],
)
def test_normalization_comes_once_before_the_first_augmentation_of_floats(
    domains: list[Domain], seen: list[str]
) -> None:
    calls: list[str] = []
    steps = [Recorded(domain, calls) for domain in domains]
    augmentation = Augmentation(steps, normalize=lambda inputs: inputs.float() / 255 - 1)
    images = (COLOR * 255).byte()
    out, targets = augmentation((images, LABELS), seed=0, epoch=0, indices=np.arange(50))
    assert calls == seen
    assert out.equal(images.float() / 255 - 1)
    assert targets.equal(LABELS)


def test_normalization_does_not_change_the_draws() -> None:
    for augments in KINDS.values():
        made = Augmentation(augments, normalize=lambda inputs: inputs.clone())(
            (COLOR, LABELS), seed=1, epoch=3, indices=np.arange(50)
        )
        for one, other in zip(made, augmented(augments, range(50)), strict=True):
            assert one.equal(other)


def test_augmentations_of_pixels_behind_those_of_floats_are_refused_with_the_order_to_use() -> None:
    steps = [RandomHorizontalFlip(), RandomErasing(), RandomShift(1), Recorded("pixels", [])]
    with pytest.raises(
        DataError, match=r"data.augment.3: Recorded works .* data.augment.1, RandomErasing.*put Recorded before it"
    ):
        Augmentation(steps, normalize=lambda inputs: inputs)
    Augmentation(steps)  # without data.normalize nothing says that the images are normalized
    with pytest.raises(DataError, match="domain to be one of pixels, any, floats, found 'pixel'"):
        Augmentation([Recorded("pixel", [])], normalize=lambda inputs: inputs)  # type: ignore[arg-type]


def test_the_domain_of_one_of_follows_from_its_members() -> None:
    pixels, floats = Recorded("pixels", []), Recorded("floats", [])
    assert OneOf([RandomShift(1), RandomHorizontalFlip()]).domain == "any"
    assert OneOf([RandomShift(1), pixels]).domain == "pixels"
    assert OneOf([floats, RandomShift(1)]).domain == "floats"
    with pytest.raises(DataError, match=r"Recorded \(pixels\), Mixup \(floats\)"):
        OneOf([pixels, Mixup(10)])
