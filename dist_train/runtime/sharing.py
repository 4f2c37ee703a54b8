"""Which ranks of a start keep the growing files of a run under a URL in one local directory, and which of them uploads what.

Neither the launcher nor the host's name can tell: ranks on one machine may have caches of their own (XDG_CACHE_HOME, or
containers that share the host's pids but not its files), and hosts may share a home directory. So the directory is asked.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.runtime.launch import node_id
from dist_train.runtime.storage import open_storage

if TYPE_CHECKING:
    from dist_train.runtime.world import World

RANK_FOLDERS = ("logs", "trace", "digest")  # what every rank writes; the rest is rank 0's
_RANK = re.compile(r"(?:.*[/-])?rank-(\d+)\.\w+")  # rank-1.log, nccl-rank-1.json, attempt-0-rank-1.jsonl


@dataclass(frozen=True)
class Sharing:
    """The ranks whose files are in the same directory as this one's.

    Attributes:
        rank: this one. size: the world size. directory: the ranks that write into this directory, on whatever host.
        node: those of them on this host. Another host's may not have reached the directory's server yet, so that each host
            uploads its own.
    """

    rank: int = 0
    size: int = 1
    directory: tuple[int, ...] = (0,)
    node: tuple[int, ...] = (0,)

    @property
    def first(self) -> bool:
        """Whether this rank does what is to be done once in this directory."""
        return self.rank == self.directory[0]

    @property
    def leads(self) -> bool:
        """Whether this rank uploads for those on its host."""
        return self.rank == self.node[0]

    def uploads(self, name: str) -> bool:
        """Whether a file in this directory is to be uploaded by a rank that leads.

        The one that writes it is nearest to it: a copy of another start's on this host would replace the newer one. Files of
        ranks that this start doesn't have are what earlier starts have left here.
        """
        folder, _, rest = name.partition("/")
        match = _RANK.fullmatch(rest)
        if folder not in RANK_FOLDERS or match is None:
            return self.rank == 0
        rank = int(match[1])
        return rank in self.node or (self.first and rank >= self.size)


def find_sharing(root: Path, world: World, start: str) -> Sharing:
    """All ranks compare their directories; `start` is a text that they have in common, and no other start has.

    Raises StorageError if the directory can't be written.
    """
    copies, marker = open_storage(root), f".tmp-{start}"
    copies.makedirs()
    copies.create_exclusive(marker, secrets.token_hex(8).encode())  # by one of those that share it
    mine = [copies.read_bytes(marker).decode(), node_id()]
    found = world.all_gather(mine)
    copies.delete(marker)  # all have read it
    directory = tuple(rank for rank, (where, _) in enumerate(found) if where == mine[0])
    node = tuple(rank for rank in directory if found[rank] == mine)
    return Sharing(world.rank, world.size, directory, node)
