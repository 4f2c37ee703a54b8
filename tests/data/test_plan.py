from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data import DataError
from dist_train.data.plan import EvalPlan, Plan, StepSampler, micro_slices, rank_slice


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    length = draw(st.integers(1, 60))
    drop_last = draw(st.booleans())
    batch = draw(st.integers(1, length if drop_last else 70))
    return Plan(draw(st.integers(0, 2**63 - 1)), length, batch, draw(st.booleans()), drop_last)


@given(plan=plans(), world_size=st.integers(1, 8), micro=st.integers(1, 20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_sample_of_an_epoch_is_read_exactly_once_over_any_ranks_micro_batches_and_resume_point(
    plan: Plan, world_size: int, micro: int, data: st.DataObject
) -> None:
    epoch = data.draw(st.integers(0, 5))
    begin, end = epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch
    stopped = data.draw(st.integers(begin, end))
    changed = data.draw(st.integers(1, 8))  # the resumed run has another world size
    for first, last, world in [(begin, stopped, world_size), (stopped, end, changed)]:
        for step in range(first, last):
            batch = plan.batch(step)
            seen = np.full(len(batch), -1)
            for rank in range(world):
                mine = plan.micro_batches(step, rank, world, micro)
                assert [r.last for r in mine] == [False] * (len(mine) - 1) + [True]
                for request in mine:
                    assert (request.step, request.epoch) == (step, epoch)
                    if not request.zero_weight:
                        assert 1 <= len(request.indices) <= micro
                        places = slice(request.position, request.position + len(request.indices))
                        assert (seen[places] == -1).all()
                        seen[places] = request.indices
            assert (seen == batch).all()
    trained = np.concatenate([plan.batch(step) for step in range(begin, end)])
    assert len(trained) == plan.samples_per_epoch
    assert len(np.unique(trained)) == len(trained)
    if not plan.drop_last:
        assert sorted(trained) == list(range(plan.length))


@given(plan=plans(), step=st.integers(0, 10**7))
@settings(deadline=None)
def test_the_size_of_a_step_is_known_without_its_order(plan: Plan, step: int) -> None:
    assert plan.batch_samples(step) == len(plan.batch(step))


def test_the_order_is_a_permutation_pinned_forever() -> None:
    plan = Plan(seed=0, length=10, global_batch_size=5)
    assert plan.order(0).tolist() == [7, 1, 8, 9, 2, 6, 4, 3, 5, 0]
    assert plan.order(1).tolist() == [8, 3, 6, 5, 0, 2, 4, 1, 7, 9]
    assert plan.fingerprint() == "01f43f552f776497"


def test_the_order_changes_with_epoch_seed_and_all_64_bits_of_the_seed() -> None:
    plan = Plan(0, 1000, 10)
    orders = [plan.order(0), plan.order(1), Plan(1, 1000, 10).order(0), Plan(2**40, 1000, 10).order(0)]
    for k, one in enumerate(orders):
        assert sorted(one) == list(range(1000))
        for other in orders[k + 1 :]:
            assert (one == other).mean() < 0.02


def test_the_fingerprint_differs_when_the_seed_or_the_length_does() -> None:
    marks = {Plan(s, n, 4, shuffle).fingerprint() for s, n, shuffle in [(0, 20, True), (1, 20, True), (0, 21, True)]}
    assert len(marks) == 3
    assert Plan(0, 20, 4).fingerprint() == Plan(0, 20, 5, drop_last=False).fingerprint()


def test_without_shuffling_the_dataset_comes_in_order() -> None:
    plan = Plan(0, 7, 3, shuffle=False, drop_last=False)
    assert [plan.batch(s).tolist() for s in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]


def test_nobody_can_change_the_order_in_place() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Plan(0, 10, 5).batch(0)[0] = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 4), "no samples"),
        ((0, 10, 0), "at least 1, found 0"),
        ((0, 10, 16), "10 samples, fewer than one global batch of 16.*global_batch_size=10.*drop_last=false"),
    ],
)
def test_a_plan_without_a_step_is_refused_with_a_hint(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Plan(*arguments)


@given(n=st.integers(0, 500), world_size=st.integers(1, 16), micro=st.integers(1, 100))
def test_shares_and_parts_cover_everything_and_differ_by_at_most_one(n: int, world_size: int, micro: int) -> None:
    pieces = [rank_slice(n, rank, world_size) for rank in range(world_size)]
    assert [k for piece in pieces for k in range(n)[piece]] == list(range(n))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    whole = micro_slices(n, 0, 1, micro)
    assert len(whole) == -(-n // micro)
    assert all(piece.stop - piece.start <= micro for piece in whole)
    mine = [piece for rank in range(world_size) for piece in micro_slices(n, rank, world_size, micro)]
    assert [k for piece in mine for k in range(n)[piece]] == list(range(n))


def test_the_smallest_forward_is_found_in_the_last_batch_of_an_epoch() -> None:
    plan = Plan(0, 67, 32, drop_last=False)  # 32 + 32 + 3
    assert plan.smallest_micro_batch(1, 32) == 3
    assert plan.smallest_micro_batch(2, 32) == 1
    assert plan.smallest_micro_batch(4, 32) == 1
    assert Plan(0, 67, 32).smallest_micro_batch(4, 8) == 8
    assert Plan(0, 67, 32).smallest_micro_batch(4, 5) == 4


@given(length=st.integers(1, 300), batch=st.integers(1, 64), world_size=st.integers(1, 8))
def test_eval_batches_cover_the_dataset_once_and_do_not_depend_on_the_world_size(
    length: int, batch: int, world_size: int
) -> None:
    plan = EvalPlan(length, batch)
    whole = plan.batches(0, 1)
    assert [k for batch in whole for k in batch] == list(range(length))
    over_ranks = [batch for rank in range(world_size) for batch in plan.batches(rank, world_size)]
    assert sorted(over_ranks, key=lambda batch: batch.start) == whole
    assert len(plan) == len(whole)


def test_the_sampler_is_a_distributed_sampler_for_one_epoch_and_has_its_length() -> None:
    plan = Plan(3, 50, 8, drop_last=False)
    for rank in range(3):
        sampler = StepSampler(plan, rank=rank, world_size=3, micro_batch_size=2)
        sampler.set_epoch(4)
        requested = list(sampler)
        assert len(sampler) == len(requested)
        assert {r.epoch for r in requested} == {4}
        assert [r.step for r in requested if r.last] == list(range(28, 35))


def test_the_sampler_begins_in_the_middle_of_an_epoch_and_crosses_its_end() -> None:
    plan = Plan(3, 50, 8)
    sampler = StepSampler(plan, rank=0, world_size=1, micro_batch_size=8)
    sampler.set_steps(4, 9)
    assert [(r.step, r.epoch) for r in sampler] == [(4, 0), (5, 0), (6, 1), (7, 1), (8, 1)]
    sampler.set_steps(10**12, None)
    assert next(iter(sampler)).epoch == 10**12 // 6


def test_a_rank_without_samples_gets_the_first_two_of_the_batch_with_zero_weight() -> None:
    plan = Plan(0, 5, 3, shuffle=False, drop_last=False)
    (request,) = plan.micro_batches(0, 3, 4, 8)
    assert request.zero_weight
    assert request.last
    assert request.indices.tolist() == [0, 1]
    (alone,) = Plan(0, 4, 3, shuffle=False, drop_last=False).micro_batches(1, 1, 4, 8)
    assert alone.indices.tolist() == [3]


@given(world_size=st.integers(1, 5), micro=st.integers(1, 8), neighbours=st.integers(1, 3))
def test_neighbours_are_the_next_samples_of_the_global_batch_which_is_a_ring(
    world_size: int, micro: int, neighbours: int
) -> None:
    plan = Plan(1, 40, 10)
    batch = plan.batch(2).tolist()
    for rank in range(world_size):
        for request in plan.micro_batches(2, rank, world_size, micro, neighbours):
            expected = [batch[(request.position + k) % 10] for k in range(len(request.indices))]
            assert request.indices.tolist() == expected
