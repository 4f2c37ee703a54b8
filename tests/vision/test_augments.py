"""The library's batched augmentations: torchvision's distributions and values, for a sample whatever batch it is in."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import transforms
from torchvision.transforms import autoaugment
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from dist_train.data import (
    Augment,
    ColorJitter,
    CutMix,
    Cutout,
    DataError,
    Draws,
    OneOf,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
    TrivialAugmentWide,
)
from dist_train.data.augment import Augmentation, sample_keys
from dist_train.vision import color, erasing, geometry, mixing, trivial

CPU = torch.device("cpu")
PIXELS = torch.randint(0, 256, (16, 3, 19, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
AUGMENTS: dict[str, Augment] = {
    "crop": RandomCrop((17, 15), padding=(2, 3), fill=1), "shift": RandomShift(3), "horizontal": RandomHorizontalFlip(),
    "vertical": RandomVerticalFlip(), "resized": RandomResizedCrop((9, 11)), "cutout": Cutout(6, p=0.7),
    "erasing": RandomErasing(), "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1), "trivial": TrivialAugmentWide(),
}  # fmt: skip


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(sample_keys(seed, 0, np.arange(count)), 0, CPU)


def augmented(augment: Augment, images: Tensor, first: int = 0) -> Tensor:
    rows = np.arange(first, first + len(images))
    out, _ = Augmentation([augment])((images, torch.arange(len(images))), seed=0, epoch=0, indices=rows)
    return out


def repeated(image: Tensor, count: int) -> Tensor:
    return image.expand(count, *image.shape)


def test_a_crop_is_a_window_of_torchvisions_padded_image_and_all_are_equally_likely() -> None:
    image = torch.arange(1, 61, dtype=torch.uint8).view(1, 6, 10)
    padded = v1.pad(image, [1, 0, 2, 3], fill=77)
    windows = {
        padded[:, y : y + 7, x : x + 9].numpy().tobytes(): (y, x) for y in range(9 - 7 + 1) for x in range(13 - 9 + 1)
    }
    out = augmented(RandomCrop((7, 9), padding=(1, 0, 2, 3), fill=77), repeated(image, 3000))
    counts = dict.fromkeys(windows, 0)
    for window in out:
        counts[window.numpy().tobytes()] += 1  # a KeyError: it is none of them
    assert len(counts) == 15
    torch.manual_seed(0)
    theirs = dict.fromkeys(windows.values(), 0)
    for _ in range(3000):
        y, x, *_ = transforms.RandomCrop.get_params(padded, (7, 9))
        theirs[y, x] += 1
    table = [list(counts.values()), [theirs[place] for place in windows.values()]]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize(("kind", "dim"), [(RandomHorizontalFlip, 2), (RandomVerticalFlip, 1)])
def test_flips_mirror_whole_images_with_their_probability(kind: Callable[[float], Augment], dim: int) -> None:
    image = PIXELS[0]
    out = augmented(kind(0.3), repeated(image, 3000))
    mirrored = (out == image.flip(dim)).flatten(1).all(1)
    assert (mirrored | (out == image).flatten(1).all(1)).all()
    assert stats.binomtest(int(mirrored.sum()), 3000, 0.3).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width", "scale"), [(40, 40, (0.08, 1.0)), (30, 90, (0.3, 0.9))])
def test_boxes_of_a_resized_crop_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    image, ratio = torch.empty(3, height, width), (3 / 4, 4 / 3)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(2000)], dtype=float
    )
    ours = RandomResizedCrop(8, scale=scale, ratio=ratio).boxes(draws(2000), height, width).numpy().astype(float)
    assert ((ours[:, :2] >= 0) & (ours[:, :2] + ours[:, 2:] <= [height, width])).all()
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / np.maximum(height - box[:, 2], 1),
        lambda box: box[:, 1] / np.maximum(width - box[:, 3], 1),
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    narrower = RandomResizedCrop(8, scale=(scale[0], scale[1] * 0.8)).boxes(draws(2000), height, width).double().numpy()
    assert stats.ks_2samp(narrower[:, 2] * narrower[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue < 1e-3


@pytest.mark.parametrize(("height", "width"), [(20, 50), (50, 20), (30, 30)])
def test_a_box_that_never_fits_is_torchvisions_central_one(height: int, width: int) -> None:
    for ratio in ((3.0, 4.0), (0.2, 0.3), (0.9, 1.1)):
        ours = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=ratio).boxes(draws(5), height, width)
        theirs = transforms.RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], list(ratio))
        assert ours.tolist() == [list(theirs)] * 5


@pytest.mark.parametrize("size", [(32, 24), (7, 40)])
def test_resized_boxes_have_torchvisions_pixels(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (12, 3, 45, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = RandomResizedCrop(size)
    boxes = augment.boxes(draws(12), 45, 37)
    for batch in (images, images.contiguous(memory_format=torch.channels_last), images.float() / 255):
        expected = torch.stack([
            v2.resized_crop(image, *box, list(size), antialias=True) for image, box in zip(batch, boxes.tolist())
        ])  # fmt: skip
        assert augmented(augment, batch).equal(expected)
        at_once = geometry.resize_boxes(batch, boxes, size)  # the way of a GPU
        assert at_once.dtype == batch.dtype
        assert (at_once.double() - expected.double()).abs().max() <= (1e-5 if batch.is_floating_point() else 1)


def test_cutout_overwrites_a_square_around_every_pixel_equally_often() -> None:
    out = augmented(Cutout(4, p=0.75, value=-1.0), torch.ones(4000, 2, 5, 6))
    erased = out == -1
    assert erased[:, 0].equal(erased[:, 1])
    squares = {}
    for y in range(5):
        for x in range(6):
            square = torch.zeros(5, 6, dtype=torch.bool)
            square[max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = True
            squares[square.numpy().tobytes()] = 0
    hit = erased[:, 0][erased.flatten(1).any(1)]
    for mask in hit:
        squares[mask.numpy().tobytes()] += 1  # a KeyError: it is none of them
    assert stats.binomtest(len(hit), 4000, 0.75).pvalue > 1e-3
    assert len(squares) == 30
    assert stats.chisquare(list(squares.values())).pvalue > 1e-3


def test_jitter_factors_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"brightness": 0.4, "contrast": (0.2, 3.0), "saturation": 1.5, "hue": 0.1}
    theirs = transforms.ColorJitter(**settings)
    rows = [theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(2000)]
    factors, order = ColorJitter(**settings).draw(draws(2000))
    for k in range(4):
        assert stats.ks_2samp(factors[:, k], [row[k + 1] for row in rows]).pvalue > 1e-3
    found = dict.fromkeys(permutations(range(4)), 0)
    for one in order.tolist():
        found[tuple(one)] += 1
    assert stats.chisquare(list(found.values())).pvalue > 1e-3
    assert set(map(tuple, ColorJitter(contrast=0.1, hue=0.2).draw(draws(50))[1].tolist())) == {(1, 3), (3, 1)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("floats", [False, True])
def test_jitter_has_torchvisions_values_in_the_order_drawn(channels: int, floats: bool) -> None:
    images = repeated(PIXELS[0, :channels], 80)
    images = images / 255 if floats else images
    augment = ColorJitter(0.8, 0.8, 0.8, 0.5)
    factors, order = augment.draw(draws(80))
    functions = (v1.adjust_brightness, v1.adjust_contrast, v1.adjust_saturation, v1.adjust_hue)
    for image, out, factor, ops in zip(
        images, augmented(augment, images), factors.tolist(), order.tolist(), strict=True
    ):
        for op in ops:
            image = functions[op](image, factor[op])
        difference = (out.double() - image.double()).abs()
        assert difference.max() <= (1e-4 if floats else 4)  # a level in one step is a few after more contrast
        assert difference.mean() <= (1e-5 if floats else 0.05)


def test_trivial_augment_draws_operations_bins_and_signs_as_torchvisions() -> None:
    augment, theirs = TrivialAugmentWide(7), transforms.TrivialAugmentWide(7)._augmentation_space(7)
    kinds, magnitude = augment.draw(draws(7000))
    assert stats.chisquare(torch.bincount(kinds, minlength=14)).pvalue > 1e-3
    assert list(augment.names) == list(theirs)
    for kind, (magnitudes, signed) in enumerate(theirs.values()):
        values = magnitudes.double().reshape(-1)
        if augment.names[kind].startswith("Translate"):
            values = values.floor()  # _apply_op truncates
        expected = torch.cat([values, -values]) if signed else values
        levels, counts = np.unique(magnitude[kinds == kind].numpy() + 0.0, return_counts=True)
        assert levels.tolist() == sorted(set(expected.add(0.0).tolist()))
        if len(levels) > 1:  # 0 is drawn with either sign
            assert stats.chisquare(counts / np.where(signed & (levels == 0), 2, 1)).pvalue > 1e-4


@pytest.mark.parametrize("name", TrivialAugmentWide.names)
def test_an_operation_has_torchvisions_values_at_every_magnitude(name: str) -> None:
    wide = TrivialAugmentWide()
    kind = wide.names.index(name)
    magnitude = (
        torch.cat([wide.magnitudes[kind], -wide.magnitudes[kind]]) if wide._signed[kind] else wide.magnitudes[kind]
    )

    class Fixed(TrivialAugmentWide):
        def draw(self, draws: Draws) -> tuple[Tensor, Tensor]:
            return torch.full(magnitude.shape, kind), magnitude

    for shape in (
        (3, 20, 14),
        (1, 25, 25),
        (3, 2, 6),
    ):  # a difference that is even: else 90 degrees end between two pixels
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)) // 2
        out = augmented(Fixed(), repeated(image, len(magnitude)))
        floats = augmented(Fixed(), repeated(image, len(magnitude)) / 255)
        for k, m in enumerate(magnitude.tolist()):
            expected = autoaugment._apply_op(image, name, m, transforms.InterpolationMode.NEAREST, None)
            difference = (out[k].int() - expected.int()).abs()
            # torchvision computes places from -1 to 1; half way between two pixels, either is the nearest
            assert (difference > 0).float().mean() <= (0.02 if name in ("ShearX", "ShearY", "Rotate") else 0), m
            # uint8 is truncated, the gray image and the result
            assert (floats[k] * 255 - out[k]).abs().max() < 2, m


def test_operations_on_floats_have_torchvisions_values() -> None:
    image = PIXELS[0].float() / 255
    one = image[None]
    for bits in (2, 5, 8):
        assert torch.allclose(trivial.posterize(one, torch.tensor([bits]))[0], v2.posterize(image, bits))
    assert torch.allclose(trivial.equalize(one, torch.ones(1))[0], v2.equalize(image), atol=1e-6)
    assert torch.allclose(trivial.autocontrast(one, torch.ones(1))[0], v2.autocontrast(image), atol=1e-6)
    assert torch.allclose(trivial.solarize(one, torch.tensor([102.0]))[0], v2.solarize(image, 0.4))
    for ours, theirs in ((color.adjust_sharpness, v2.adjust_sharpness), (color.adjust_hue, v2.adjust_hue)):
        assert torch.allclose(ours(one, torch.tensor([0.3]))[0], theirs(image, 0.3), atol=1e-5)


@pytest.mark.parametrize("kind", AUGMENTS)
@pytest.mark.parametrize("shape", [(3, 19, 14), (1, 14, 19)])
def test_a_sample_is_augmented_alike_in_whatever_batch_and_layout_it_is(kind: str, shape: tuple[int, int, int]) -> None:
    augment, pixels = AUGMENTS[kind], PIXELS[:, : shape[0]].reshape(16, *shape)
    for images in (pixels, pixels / 255):
        before = images.clone()
        out = augmented(augment, images)
        assert out.dtype == images.dtype
        assert images.equal(before)
        assert augmented(augment, images.contiguous(memory_format=torch.channels_last)).equal(out)
        for i in range(16):
            assert augmented(augment, images[i : i + 1], first=i).equal(out[i : i + 1])


@pytest.mark.parametrize("kind", ["crop", "shift", "horizontal", "vertical", "erasing", "cutout", "cutmix"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_way_of_a_gpu_has_the_bits_of_the_cpu(
    kind: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = CutMix(16) if kind == "cutmix" else AUGMENTS[kind]
    for images in (PIXELS, PIXELS / 255, PIXELS.double(), PIXELS[:, :1], PIXELS[:2]):
        images = images.contiguous(memory_format=layout)
        expected = augmented(augment, images)
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "by_numpy", lambda images: False)
            patch.setattr(erasing, "by_numpy", lambda images: False)
            assert augmented(augment, images).equal(expected)


def test_what_is_kept_of_a_mode_of_torch_does_not_outlive_it() -> None:
    mixing._beta_table.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        mixing.Mixup(16)._kept(torch.zeros(4, 2))
    assert type(mixing.Mixup(16)._kept(torch.zeros(4, 2))) is Tensor


@pytest.mark.parametrize("kind", ["crop", "shift", "horizontal", "vertical", "erasing", "cutout"])
def test_floats_get_what_uint8_gets(kind: str) -> None:
    augment = RandomCrop((17, 15), padding=3) if kind == "crop" else AUGMENTS[kind]
    assert augmented(augment, PIXELS / 255).equal(augmented(augment, PIXELS) / 255)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomCrop(0), "RandomCrop: expected size to be one or two"),
        (lambda: RandomCrop(4, padding=(1, 2, 3)), "one, two or four numbers of pixels >= 0"),
        (
            lambda: augmented(RandomCrop(21, padding=1), PIXELS),
            r"at least 21 x 21 after padding, found 19 x 14 with padding",
        ),
        (lambda: augmented(RandomCrop(4, 1, fill=0.5), PIXELS), "whole number in 0..255 for uint8 images, found 0.5"),
        (lambda: augmented(RandomVerticalFlip(), PIXELS[0]), r"RandomVerticalFlip needs images \(N, C, H, W\)"),
        (lambda: RandomResizedCrop(8, scale=(0, 1)), "scale within 0..1"),
        (lambda: augmented(RandomResizedCrop(8), PIXELS.int()), "uint8 or floating point images, found torch.int32"),
        (lambda: Cutout(0), "size >= 1"),
        (
            lambda: Augmentation([CutMix(3)])(
                (PIXELS, torch.full((16,), -100)), seed=0, epoch=0, indices=np.arange(16)
            ),
            r"labels from 0 to 2 \(classes=3\), found \[-100\]",
        ),
        (lambda: ColorJitter(brightness=-0.1), "brightness to be one number >= 0"),
        (lambda: ColorJitter(hue=0.6), "within -0.5..0.5, found 0.6"),
        (lambda: TrivialAugmentWide(1), "num_magnitude_bins >= 2"),
        (
            lambda: augmented(ColorJitter(0.1), PIXELS / 127),
            r"floats in \[0, 1\], found floats in \[0, 2.01\]: normalize by",
        ),
        (lambda: augmented(TrivialAugmentWide(), PIXELS[:, :2]), "1 or 3 channels"),
        (lambda: augmented(TrivialAugmentWide(), PIXELS.long()), "found torch.int64"),
        (lambda: Augmentation([RandomErasing(), ColorJitter()], normalize=lambda x: x), "put ColorJitter before it"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_domains_say_where_normalization_comes() -> None:
    assert [AUGMENTS[kind].domain for kind in ("crop", "vertical", "resized", "jitter", "trivial", "cutout")] == [
        "any", "any", "any", "pixels", "pixels", "floats",
    ]  # fmt: skip
    assert OneOf([RandomVerticalFlip(), CutMix(10)]).domain == "any"
    assert OneOf([RandomVerticalFlip(), ColorJitter(0.1)]).domain == "pixels"
    assert math.isclose(float(augmented(Cutout(40), PIXELS / 255).sum()), 0.0)


@pytest.mark.parametrize("size", [1, 4])
def test_members_of_one_of_that_change_the_size_are_refused_and_not_broadcast(size: int) -> None:
    augmentation = Augmentation([OneOf([RandomResizedCrop(size), RandomHorizontalFlip()])])
    with pytest.raises(DataError, match=r"OneOf: .* RandomResizedCrop made .* of \(6, 3, 8, 8\): put it before OneOf"):
        augmentation((torch.rand(6, 3, 8, 8), torch.zeros(6).long()), seed=0, epoch=0, indices=np.arange(6))
