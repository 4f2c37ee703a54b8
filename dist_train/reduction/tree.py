"""Sums along one fixed binary tree over the micro-batches of a global batch, on any number of ranks, bitwise identical.

Floating-point addition isn't associative, so that a sum's bits depend on the order in which it is taken. Here the order is part
of the problem: leaf k is micro-batch k, and a node of level j is the sum of two nodes of level j - 1, which cover leaves
k * 2**j to (k + 1) * 2**j (a node whose second half has no leaves is its first half). a + b has the bits of b + a, so whoever
computes a node gets the same.

A rank's partial sums are kept as the digits of a binary counter (`Partials`): at most log2 of its micro-batches, twice that where
its leaves don't begin at a large subtree. Over the ranks the tree is finished in rounds of messages between ranks at distance 1
first, then at larger ones: recursive halving and doubling (Thakur, Rabenseifner and Gropp 2005: "Optimization of Collective
Communication Operations in MPICH"), with the prime factors of the world size in place of 2, so that any world size has the bytes
of a ring, 2 (ranks - 1) / ranks of the vector for each partial sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.data.plan import leaf_shares, rank_slice


class Node(NamedTuple):
    """The sum of leaves number * 2**level to (number + 1) * 2**level, as far as there are so many."""

    level: int
    number: int


class Partials:
    """The partial sums of some leaves, as few as there can be: lists of tensors, which are added in place.

    Args:
        leaves: how many leaves the whole tree has.
    """

    def __init__(self, leaves: int):
        self.leaves = leaves
        self.by_node: dict[Node, list[Tensor]] = {}

    def add(self, node: Node, value: list[Tensor]) -> None:
        """Add a node, and join it with its sibling wherever that is here already; takes over the tensors."""
        level, number = node
        while True:
            sibling = Node(level, number ^ 1)
            if (other := self.by_node.pop(sibling, None)) is not None:
                self.join(other, value)
                value = other
            elif number == 0 or (number ^ 1) << level < self.leaves:  # the root, or its sibling is still to come
                break
            level, number = level + 1, number // 2
        self.by_node[Node(level, number)] = value

    def join(self, into: list[Tensor], other: list[Tensor]) -> None:
        """Add the tensors of one node to those of its sibling."""
        torch._foreach_add_(into, other)


class _Recorded(Partials):
    """Only notes what is to be added to what."""

    def __init__(self, leaves: int):
        super().__init__(leaves)
        self.sums: list[tuple[Tensor, Tensor]] = []

    def join(self, into: list[Tensor], other: list[Tensor]) -> None:
        self.sums += zip(into, other, strict=True)


@lru_cache(maxsize=1024)
def open_nodes(start: int, stop: int, leaves: int) -> tuple[Node, ...]:
    """The nodes that `Partials` has after all leaves from `start` to `stop`, in order."""
    partials = _Recorded(leaves)
    for leaf in range(start, stop):
        partials.add(Node(0, leaf), [])
    return tuple(sorted(partials.by_node, key=lambda node: node.number << node.level))


@dataclass(eq=False)
class Exchange:
    """A message to, and one from, another rank: some tensors of one dtype, contiguous."""

    peer: int
    send: list[Tensor]
    receive: list[Tensor]

    @cached_property
    def memory(self) -> list[tuple[memoryview, memoryview]]:
        """On the CPU: bytes to send, and room for those that come meanwhile."""
        pairs = itertools.zip_longest(map(_memory, self.send), map(_memory, self.receive), fillvalue=memoryview(b""))
        return list(pairs)


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def prime_factors(number: int) -> tuple[int, ...]:
    """In ascending order; () for 1."""
    for factor in range(2, number + 1):
        if number % factor == 0:
            return (factor, *prime_factors(number // factor))
    return ()


class Round(NamedTuple):
    """Messages that may all be under way at once, and what to do when they are there: sums, then copies, as (into, from)."""

    messages: list[Exchange]
    sums: list[tuple[Tensor, Tensor]]
    copies: list[tuple[Tensor, Tensor]]


class Stage(NamedTuple):
    """Messages among `radix` ranks whose numbers differ by multiples of `distance`; `mine` is this rank's place among them.

    Until then `distance` neighbouring ranks have the sums over all their leaves, each of its own piece of the vector; afterwards
    radix * distance ranks do.
    """

    radix: int
    distance: int
    mine: int
    first: int
    """The lowest of these ranks."""
    offset: int
    """Where the piece begins that each of them has."""
    parts: tuple[slice, ...]
    """What of it each of them sums."""

    def partners(self) -> Iterator[tuple[int, int]]:
        """(place, rank) of the others, in an order in which all pairs meet: that of a round-robin tournament."""
        for turn in range(self.radix):
            place = (turn - self.mine) % self.radix
            if place != self.mine:
                yield place, self.first + place * self.distance

    def absolute(self, place: int) -> slice:
        """What of the whole vector a member sums."""
        part = self.parts[place]
        return slice(self.offset + part.start, self.offset + part.stop)


def stages(rank: int, world_size: int, size: int, halve: bool) -> list[Stage]:
    """The stages of a sum of `size` numbers, in order."""
    found: list[Stage] = []
    distance, offset = 1, 0
    for radix in prime_factors(world_size):
        mine = rank // distance % radix
        parts = tuple(rank_slice(size, k, radix) if halve else slice(0, size) for k in range(radix))
        found.append(Stage(radix, distance, mine, rank - mine * distance, offset, parts))
        distance, offset, size = distance * radix, offset + parts[mine].start, parts[mine].stop - parts[mine].start
    return found


def peers(rank: int, world_size: int) -> list[int]:
    """The ranks that `rank` exchanges messages with."""
    return [peer for stage in stages(rank, world_size, 0, halve=False) for _, peer in stage.partners()]


class TreeSum:
    """The sum of one vector over the leaves of all ranks, finished on every rank.

    Usage: fill `mine`, run the rounds of `rounds()` in order, all ranks the same, and read `total`.

    Args:
        leaves: of the whole tree; rank r has those of `leaf_shares(leaves, world_size)[r]`.
        size: of the vector. like: a tensor of its dtype and device.
        halve: each rank sums a part of the vector and then sends that to the others, which moves fewer bytes; else each sums all
            of it, which takes half of the messages.

    Attributes:
        mine: this rank's partial sums, a vector for each node of `nodes`, in order.
        total: the sum; valid until `mine` is filled again.
    """

    def __init__(self, rank: int, world_size: int, leaves: int, size: int, like: Tensor, halve: bool = True):
        self.rank, self.leaves, self.halve = rank, leaves, halve
        self.shares, self.stages = leaf_shares(leaves, world_size), stages(rank, world_size, size, halve)
        self.nodes = self._nodes(rank, 1)
        self.mine = [like.new_zeros(size) for _ in self.nodes]
        self.total = self.mine[0] if self.mine else like.new_zeros(size)
        self._program = [*self._up(), *self._down()]

    def _nodes(self, first: int, ranks: int) -> tuple[Node, ...]:
        """The partial sums that the `ranks` ranks from `first` on have together, in order."""
        return open_nodes(self.shares[first].start, self.shares[first + ranks - 1].stop, self.leaves)

    def rounds(self) -> Iterator[list[Exchange]]:
        """Messages that may all be under way at once; what they bring is used when the next ones are asked for."""
        for messages, sums, copies in self._program:
            yield messages
            for into, other in sums:
                into.add_(other)
            for into, other in copies:
                into.copy_(other)

    def _up(self) -> Iterator[Round]:
        """Each stage joins the sums of its ranks; after the last the piece that this rank has is the root's."""
        values, whole = list(self.mine), self.total
        for stage in self.stages:
            part = stage.parts[stage.mine]
            partials, messages = _Recorded(self.leaves), list[Exchange]()
            received = list[tuple[Node, Tensor]]()
            for place, peer in stage.partners():
                theirs = self._nodes(peer - peer % stage.distance, stage.distance)
                room = [self.total.new_empty(part.stop - part.start) for _ in theirs]
                messages.append(Exchange(peer, [value[stage.parts[place]] for value in values], room))
                received += zip(theirs, room, strict=True)
            nodes = self._nodes(self.rank - self.rank % stage.distance, stage.distance)
            partials.by_node = {node: [value[part]] for node, value in zip(nodes, values, strict=True)}
            for node, value in received:
                partials.add(node, [value])
            merged = self._nodes(stage.first - stage.first % stage.distance, stage.radix * stage.distance)
            values = [partials.by_node[node][0] for node in merged]
            copies = list[tuple[Tensor, Tensor]]()
            if stage is self.stages[-1]:
                own = whole[stage.absolute(stage.mine)]
                copies = [(own, values[0])] if own.data_ptr() != values[0].data_ptr() else []
            yield Round(messages, partials.sums, copies)

    def _down(self) -> Iterator[Round]:
        """If each rank has only a piece, they exchange these in the opposite order."""
        for stage in reversed(self.stages) if self.halve else ():
            mine = self.total[stage.absolute(stage.mine)]
            messages = [Exchange(peer, [mine], [self.total[stage.absolute(place)]]) for place, peer in stage.partners()]
            yield Round(messages, [], [])
