"""The reduction's tree as a pure function: ranks are generators here, and messages are copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.distributed._local_tensor import LocalRunnerMode, LocalTensor, LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_train.data.plan import leaf_shares, leaf_slices
from dist_train.reduction.tree import Exchange, Node, Partials, TreeSum, open_nodes, prime_factors

SIZE = 7  # of a vector: not a multiple of most world sizes


def by_recursion(leaves: list[Tensor], start: int = 0, level: int | None = None) -> Tensor:
    """The definition of the tree: a power of two of leaves, halved until one is left."""
    if level is None:
        level = (len(leaves) - 1).bit_length()
    if level == 0:
        return leaves[start]
    half = 1 << (level - 1)
    first = by_recursion(leaves, start, level - 1)
    return first if start + half >= len(leaves) else first + by_recursion(leaves, start + half, level - 1)


def fill(tree: TreeSum, leaves: list[Tensor], mine: range) -> None:
    partials = Partials(len(leaves))
    for leaf in mine:
        partials.add(Node(0, leaf), [leaves[leaf].clone()])
    for node, room in zip(tree.nodes, tree.mine, strict=True):
        room.copy_(partials.by_node[node][0])


def deliver(sent: dict[int, list[Exchange]]) -> None:
    """Every message of a round, checked to be expected by the other end."""
    copies = {
        (rank, message.peer): [tensor.clone() for tensor in message.send]
        for rank, messages in sent.items()
        for message in messages
    }
    for rank, messages in sent.items():
        for message in messages:
            for room, tensor in zip(message.receive, copies.pop((message.peer, rank)), strict=True):
                assert room.shape == tensor.shape
                room.copy_(tensor)
    assert not copies


def summed(leaves: list[Tensor], ranks: int, halve: bool) -> list[Tensor]:
    trees = [TreeSum(rank, ranks, len(leaves), SIZE, leaves[0], halve) for rank in range(ranks)]
    for _ in range(2):  # buffers are used again
        for tree, mine in zip(trees, leaf_shares(len(leaves), ranks), strict=True):
            fill(tree, leaves, mine)
        for rounds in zip(*(tree.rounds() for tree in trees), strict=True):
            deliver(dict(enumerate(rounds)))
    return [tree.total for tree in trees]


def numbers(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZE, generator=generator) * 10 ** (k % 5) for k in range(count)]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_any_number_of_ranks_gets_the_bits_of_the_recursive_sum(leaves: int, ranks: int, halve: bool) -> None:
    values = numbers(leaves, seed=leaves)
    expected = by_recursion(values)
    assert all(torch.equal(total, expected) for total in summed(values, ranks, halve))


@pytest.mark.parametrize("ranks", range(1, 10))
def test_all_small_cases_get_the_bits_of_the_recursive_sum(ranks: int) -> None:
    for leaves in range(1, 18):
        values = numbers(leaves, seed=ranks)
        for halve in (True, False):
            assert all(torch.equal(total, by_recursion(values)) for total in summed(values, ranks, halve))


def test_another_order_has_other_bits() -> None:
    values = numbers(9, seed=0)
    assert not torch.equal(sum(values[1:], values[0]), by_recursion(values))


def virtual(rank: int, tensor: Tensor) -> LocalTensor:
    """A rank's tensor as LocalTensorMode takes it for a message."""
    local = LocalTensor({rank: tensor})
    local.__src_rank__ = rank
    return local


def run_on_threads(rank: int, tree: TreeSum) -> None:
    """One rank under torch's LocalTensorMode, which delivers references, and puts them in the place of what is to receive."""
    for messages in tree.rounds():
        works, rooms = [], []
        for message in messages:
            works += [distributed.isend(virtual(rank, tensor.clone()), message.peer) for tensor in message.send]
            for tensor in message.receive:
                received = virtual(rank, torch.empty_like(tensor))
                works.append(distributed.irecv(received, message.peer))
                rooms.append((tensor, received))
        for work in works:
            work.wait()
        for tensor, received in rooms:
            tensor.copy_(received._local_tensors[rank])


@pytest.mark.parametrize("halve", [True, False])
@pytest.mark.parametrize(("ranks", "leaves"), [(2, 4), (3, 7), (5, 13), (6, 6), (8, 20), (12, 12)])
def test_ranks_that_wait_for_each_other_only_where_they_receive_get_the_same_bits(
    ranks: int, leaves: int, halve: bool
) -> None:
    """By torch's isend and irecv under LocalTensorMode: each rank goes on as soon as its own messages are there."""
    values = numbers(leaves, seed=ranks)
    trees = [TreeSum(rank, ranks, leaves, SIZE, values[0], halve) for rank in range(ranks)]
    for tree, mine in zip(trees, leaf_shares(leaves, ranks), strict=True):
        fill(tree, values, mine)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with LocalTensorMode(ranks), LocalRunnerMode(ranks, ranks, lambda rank: run_on_threads(rank, trees[rank])):
            pass
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(tree.total, by_recursion(values)) for tree in trees)


@given(st.integers(1, 300), st.integers(1, 64))
def test_shares_are_contiguous_balanced_and_leave_no_rank_idle(leaves: int, ranks: int) -> None:
    shares = leaf_shares(leaves, ranks)
    assert [leaf for share in shares for leaf in share] == list(range(leaves))
    assert max(map(len, shares)) == -(-leaves // ranks)
    assert leaves < ranks or min(map(len, shares)) >= 1


@pytest.mark.parametrize(("leaves", "ranks"), [(8, 2), (8, 4), (8, 8), (12, 3), (16, 4), (6, 3), (24, 3), (6, 4)])
def test_shares_are_whole_subtrees_where_that_is_possible(leaves: int, ranks: int) -> None:
    assert [len(open_nodes(share.start, share.stop, leaves)) for share in leaf_shares(leaves, ranks)] == [1] * ranks


@given(st.integers(1, 400), st.data())
def test_partial_sums_are_at_most_twice_the_logarithm_of_the_leaves(leaves: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, leaves - 1))
    stop = data.draw(st.integers(start + 1, leaves))
    assert len(open_nodes(start, stop, leaves)) <= 2 * (stop - start).bit_length()
    assert len(open_nodes(0, leaves, leaves)) == 1


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 40))
def test_leaves_are_the_same_for_any_number_of_ranks(n: int, ranks: int, size: int) -> None:
    alone = leaf_slices(n, 0, 1, size)
    assert [one for rank in range(ranks) for one in leaf_slices(n, rank, ranks, size)] == list(alone)
    assert all(0 < one.stop - one.start <= size for one in alone)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 8, 12])
def test_halving_moves_the_bytes_of_a_ring_where_shares_are_whole_subtrees(ranks: int) -> None:
    size = 64 * ranks
    tree = TreeSum(0, ranks, ranks, size, torch.zeros(()))
    whole = [share for share in leaf_shares(ranks, ranks) if len(open_nodes(share.start, share.stop, ranks)) == 1]
    assert len(whole) == ranks
    sent = sum(tensor.numel() for messages in tree.rounds() for message in messages for tensor in message.send)
    merged_early = ranks & (ranks - 1) == 0 or len(prime_factors(ranks)) == 1
    assert sent == 2 * size * (ranks - 1) // ranks if merged_early else sent < 4 * size
