"""Trains configs on several processes: `python forked_ranks.py '{"2": [["a.yaml", "key=value"]], "3": []}'`, by number of them.

The ranks are forks of this process, which has imported what they need: torchrun's would each take seconds to do so.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from multiprocessing import get_context

from torch.distributed import TCPStore

from dist_train import train


def rank_of(rank: int, ranks: int, port: int, jobs: list[list[str]]) -> None:
    """One rank, with torchrun's variables: trains one config after another."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    for path, *overrides in jobs:
        train(path, *overrides)


def main(jobs: dict[str, list[list[str]]]) -> None:
    """All the configs of a number of processes, then those of the next."""
    for ranks in map(int, jobs):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        arguments = [(rank, ranks, port, jobs[str(ranks)]) for rank in range(ranks)]
        processes = [get_context("fork").Process(target=rank_of, args=given) for given in arguments]
        for process in processes:
            process.start()
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # threads: not before the forks
        for process in processes:
            process.join()
        if codes := [process.exitcode for process in processes if process.exitcode]:
            sys.exit(f"exit codes of {ranks} ranks: {codes}")
        del store


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
