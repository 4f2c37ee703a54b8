"""Gradients as vectors: what is sent to other ranks in one piece."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dist_train.reduction.links import Links
from dist_train.reduction.tree import Partials, TreeSum

FIRST_BYTES = 2**20  # of the first bucket, whose communication begins early; as DDP's
CPU_MB = 4.0  # of a bucket on the CPU at most: what is left to send after the backward is small (bench/RESULTS.md)
HALVE_BYTES = 2**18  # from here on bytes take longer than messages (bench/bitwise.py)


class Bucket:
    """Some tensors of one dtype, summed over the leaves of all ranks.

    Args:
        links: to the other ranks; None on one process.
        like: what the tensors have the shapes, strides, dtype and device of.
    """

    def __init__(self, rank: int, world_size: int, links: Links | None, like: Sequence[Tensor]):
        self.rank, self.world_size, self.links, self.like = rank, world_size, links, list(like)
        # Kernels choose their order of summation by the alignment too, so all begin as memory of their own does.
        step = (512 if self.like[0].is_cuda else 64) // math.gcd(64, self.like[0].element_size())
        self._offsets, end = [], 0
        for tensor in self.like:
            self._offsets.append(end)
            end = -(-(end + tensor.numel()) // step) * step
        self._size = end
        self._tree: TreeSum | None = None
        self._views: list[list[Tensor]] = []  # of the partial sums, then of the total

    def summed(self, partials: Partials) -> list[Tensor]:
        """The sums over all leaves, of this rank's partial sums; valid until the next call."""
        if self.links is None:
            (tensors,) = partials.by_node.values()
            return tensors
        tree = self._tree_of(partials.leaves)
        for node, views in zip(tree.nodes, self._views, strict=False):
            torch._foreach_copy_(views, partials.by_node[node])
        for messages in tree.rounds():
            self.links.run(messages)
        return self._views[-1]

    def _tree_of(self, leaves: int) -> TreeSum:
        """Of the last one's memory if that had as many leaves: only an epoch's last batch may have others."""
        if self._tree is None or self._tree.leaves != leaves:
            like, self._tree = self.like[0], None
            halve = self._size * like.element_size() >= HALVE_BYTES
            self._tree = tree = TreeSum(self.rank, self.world_size, leaves, self._size, like.detach(), halve)
            self._views = [self._split(vector) for vector in (*tree.mine, tree.total)]
        return self._tree

    def _split(self, vector: Tensor) -> list[Tensor]:
        """Views with the tensors' strides: fused optimizers follow memory order, not indices."""
        return [
            vector.as_strided(tensor.shape, torch.empty_like(tensor).stride(), vector.storage_offset() + offset)
            for tensor, offset in zip(self.like, self._offsets, strict=True)
        ]


def in_buckets(tensors: Iterable[Tensor], megabytes: float) -> list[list[Tensor]]:
    """Tensors in the given order, those of one dtype together up to a size; the first bucket is small."""
    buckets: list[list[Tensor]] = []
    open_ones: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = open_ones.get(tensor.dtype)
        first = bucket is not None and bucket is buckets[0]
        most = min(FIRST_BYTES, megabytes * 2**20) if first else megabytes * 2**20
        if bucket is None or sum(one.nbytes for one in bucket) + tensor.nbytes > most:
            bucket = open_ones[tensor.dtype] = []
            buckets.append(bucket)
        bucket.append(tensor)
    return buckets
