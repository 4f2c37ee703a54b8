from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dist_train.runtime.seeding import mix, seed_forward, seed_sample


def _draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_mix_of_one_value_is_the_published_splitmix64_sequence() -> None:
    assert mix(1234567) == 6457827717110365317  # first output of the reference implementation for this seed
    assert mix(0) == 0xE220A8397B1DCDAF


def test_mix_stays_what_it_was_when_the_first_run_was_trained() -> None:
    assert mix(1, 2, 3) == 0xD0734750FDE362B3
    assert mix(-1) == mix(2**64 - 1)


def test_mix_depends_on_every_value_and_on_their_order() -> None:
    values = {mix(*v) for v in [(1, 2, 3), (3, 2, 1), (1, 3, 2), (0, 1, 2, 3), (1, 2), (1, 2, 4), (2, 2, 3)]}
    assert len(values) == 7


def test_a_sample_draws_the_same_from_torch_numpy_and_random_whatever_ran_before() -> None:
    seed_sample(7, 3, 100)
    first = _draw()
    torch.rand(13), np.random.rand(5), random.random()
    seed_sample(7, 3, 100)
    assert _draw() == first


@pytest.mark.parametrize("other", [(8, 3, 100), (7, 4, 100), (7, 3, 101), (3, 7, 100)])
def test_another_seed_epoch_or_sample_draws_other_numbers(other: tuple[int, int, int]) -> None:
    seed_sample(7, 3, 100)
    first = _draw()
    seed_sample(*other)
    assert all(a != b for a, b in zip(_draw(), first))


def test_neighbouring_samples_draw_numbers_that_look_independent() -> None:
    draws = []
    for index in range(2000):
        seed_sample(0, 0, index)
        draws.append(_draw())
    table = np.array(draws)
    assert np.abs(table.mean(axis=0) - 0.5).max() < 0.03
    for column in table.T:
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.08


def test_a_forward_draws_by_step_and_position_in_the_global_batch() -> None:
    cpu = torch.device("cpu")
    drawn = []
    for step, position in [(5, 16), (5, 16), (5, 0), (6, 16)]:
        seed_forward(0, step, position, cpu)
        drawn.append(_draw())
    assert drawn[0] == drawn[1]
    assert all(len(set(numbers)) == 3 for numbers in zip(*drawn, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_forward_seeds_the_cuda_generator_of_its_device() -> None:
    device = torch.device("cuda", 0)
    drawn = []
    for step in (5, 5, 6):
        torch.rand(3, device=device)
        seed_forward(0, step, 0, device)
        drawn.append(torch.rand((), device=device).item())
    assert drawn[0] == drawn[1] != drawn[2]
