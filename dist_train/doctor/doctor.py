"""What a job needs, checked on all its hosts before it starts; a host that fails a check is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_train.config.errors import ConfigError, mask, visible
from dist_train.config.fields import Duration, map_leaves
from dist_train.config.load import load_config
from dist_train.config.schema import Config, DistributedConfig
from dist_train.config.slots import require_components
from dist_train.doctor import dry_run, probes
from dist_train.runtime.launch import read_placement
from dist_train.runtime.storage import open_storage
from dist_train.runtime.world import World, open_world
from dist_train.text import aligned, format_bytes
from dist_train.watch.failure import write_error_file

SHARED_MEMORY = 64 << 20  # bytes; loader workers hand over batches in it
OPEN_FILES = 1024
CLOCKS = 2.0  # seconds
SLOW_LINK = 0.25  # of the median link


@dataclass
class Check:
    """The result of one check.

    Attributes:
        state: `ok`, `warn` (a job may run) or `FAIL`. hosts: those at fault.
    """

    name: str
    state: str
    text: str
    hosts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, problems: Iterable[tuple[str, str]], fine: str) -> Check:
        """A check that fails for each host with a problem, and shows the first one."""
        bad = [(host, text) for host, text in problems if text]
        if not bad:
            return cls(name, "ok", fine)
        hosts = list(dict.fromkeys(host for host, _ in bad))
        others = f" (also {', '.join(hosts[1:])})" if hosts[1:] else ""
        return cls(name, "FAIL", f"{bad[0][0]}{bad[0][1]}{others}", hosts)


@dataclass
class Diagnosis:
    """The checks (rank 0's count), and the facts of each rank: `probes.resources`, versions, clock offset."""

    checks: list[Check]
    ranks: list[dict[str, Any]]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.state == "FAIL"]

    @property
    def bad_hosts(self) -> list[str]:
        return list(dict.fromkeys(host for check in self.failed for host in check.hosts))

    def to_json(self) -> str:
        """The content of `--json`."""
        content = {"ok": not self.failed, "world_size": len(self.ranks), "bad_hosts": self.bad_hosts}
        masked = map_leaves({**content, **asdict(self)}, lambda leaf: mask(leaf) if isinstance(leaf, str) else leaf)
        return json.dumps(masked, indent=2) + "\n"

    def print(self, seconds: float) -> None:
        """A table of the ranks, a line for each check, and the verdict."""
        rows = [("rank", "host", "free memory", "/dev/shm", "clock", "device")]
        for number, rank in enumerate(self.ranks):
            memory = f"{format_bytes(rank['free'])} of {format_bytes(rank['total'])}"
            shm = format_bytes(rank["shm"]) if "shm" in rank else "-"
            rows.append((str(number), rank["host"], memory, shm, f"{rank['clock_offset']:+.3f} s", rank["device"]))
        print(*aligned(rows, right=0), "", sep="\n")
        left = max(len(check.name) for check in self.checks)
        for check in self.checks:
            text = visible(mask(check.text)).replace("\n", "\n" + " " * (left + 8))
            print(f"{check.state:<4}  {check.name:<{left}}  {text}")
        verdict = f"not ready: {', '.join(check.name for check in self.failed)}" if self.failed else "ready"
        verdict += f"; look at {', '.join(self.bad_hosts)}" if self.bad_hosts else ""
        print(f"\ndoctor: {verdict} ({len(self.ranks)} rank(s), {seconds:.1f} s)", flush=True)
        if self.failed:
            write_error_file(f"doctor: {verdict}", "")


def diagnose(
    source: str | None, overrides: Sequence[str], min_bandwidth: float | None, write: Callable[[str], object]
) -> int:
    """Run every check on all ranks and print the results; with a config file, read its data and make a dry run too.

    Args:
        source: a config file. min_bandwidth: GB/s. write: is given the results as JSON, on rank 0.

    Returns:
        0 if a job may start, 1 if not.

    Raises:
        ConfigError: the config is wrong on all ranks.
    """
    config, problem = None, None
    try:
        require_components(loaded := load_config(source, overrides))
        config = loaded
    except ConfigError as error:
        problem = error
    distributed = config.distributed if config is not None else DistributedConfig()
    patience = Duration(min(60.0, distributed.hang_timeout.value), "s")
    began = time.monotonic()
    with open_world(distributed.model_copy(update={"hang_timeout": patience}), read_placement(os.environ)) as world:
        found = _diagnose(world, config, problem, min_bandwidth)
        if config is not None and source is not None:
            splits = [split for split in ("train", "val", "test") if getattr(config.data, split) is not None]
            found.checks += [_samples(world, config, split) for split in splits]
            if world.is_main:  # a crash in the dry run ends the process
                write(Diagnosis([*found.checks, Check("dry run", "FAIL", "it crashed")], found.ranks).to_json())
            found.checks.append(_dry_run(world, config))
        found.checks = [Check(**check) for check in world.broadcast([asdict(check) for check in found.checks])]
        if world.is_main:
            write(found.to_json())
            found.print(time.monotonic() - began)
        return int(bool(found.failed))


def _diagnose(
    world: World, config: Config | None, problem: ConfigError | None, min_bandwidth: float | None
) -> Diagnosis:
    """Every check but those of the config's data and the dry run."""
    mine = {**probes.resources(world.device), "versions": probes.versions(), "problem": str(problem or "")}
    if config is not None:  # the user's code may be in another directory on each host
        text = config.model_copy(update={"run": config.run.model_copy(update={"code_paths": []})}).to_yaml()
        mine["versions"]["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    ranks = world.all_gather(mine)
    if problem is not None and all(rank["problem"] for rank in ranks):
        raise problem
    for rank, offset in zip(ranks, probes.clock_offsets(world)):
        rank["clock_offset"] = round(offset, 4)
    checks = [_same(name, ranks) for name in mine["versions"]]
    if any(rank["problem"] for rank in ranks):
        only = [(rank["host"], rank["problem"] and f" only: {rank['problem']}") for rank in ranks]
        checks.append(Check.of("config", only, ""))
    offsets = sorted(rank["clock_offset"] for rank in ranks)
    spread, usual = offsets[-1] - offsets[0], offsets[len(offsets) // 2]
    wrong = f"'s clock differs by up to {spread:.1f} s: start NTP there"
    off = [(rank["host"], wrong) for rank in ranks if abs(rank["clock_offset"] - usual) > CLOCKS]
    shm = "loader workers need it: free some, or docker run --shm-size=8g"
    files = f"ulimit -n {OPEN_FILES} or more: loader workers and sockets need them"
    checks += [
        _at_least("/dev/shm", "shm", SHARED_MEMORY, lambda value: f"{format_bytes(value)} free", ranks, shm),
        _at_least("open files", "files", OPEN_FILES, str, ranks, files),
        Check.of("clocks", off, f"within {spread * 1e3:.0f} ms"),
        _storage(world, config.run.place if config is not None else "runs"),
    ]
    if world.size > 1:
        checks += _network(world, min_bandwidth)
    return Diagnosis(checks, ranks)


def _same(name: str, ranks: list[dict[str, Any]]) -> Check:
    values = [(rank["host"], rank["versions"].get(name, "none")) for rank in ranks]
    usual = Counter(value for _, value in values).most_common(1)[0][0]  # of equally many, rank 0's
    hint = f"the others have {usual}: make them the same"
    return Check.of(name, [(host, f" has {value}, {hint}") for host, value in values if value != usual], usual)


def _at_least(
    name: str, key: str, least: int, shown: Callable[[int], str], ranks: list[dict[str, Any]], hint: str
) -> Check:
    known = {rank["host"]: rank[key] for rank in ranks if key in rank}
    low = {host: value for host, value in known.items() if 0 <= value < least}
    wrong = [(host, f": {shown(value)}, expected at least {shown(least)}; {hint}") for host, value in low.items()]
    return Check.of(name, wrong, f"at least {shown(min(known.values()))}" if known else "not on this system")


def _storage(world: World, where: str) -> Check:
    """Write, read and delete a file in `run.dir` from each host, and compare what the hosts see."""
    name = world.broadcast(f".doctor-{secrets.token_hex(6)}")
    mine, error, leads = f"{name}-{world.rank}", "", world.placement.local_rank == 0
    if leads:
        try:
            storage = open_storage(where, patience=2.0)
            new = not storage.exists("")
            storage.makedirs()
            storage.write_atomic(mine, b"doctor")
            if storage.read_bytes(mine) != b"doctor":
                error = ": the file reads back with other content than was written"
        except Exception as failed:
            error = f": {failed}; set run.dir to a directory that every host can write to"
    world.barrier()
    if leads and not error:
        with contextlib.suppress(Exception):
            if not storage.exists(f"{name}-0"):
                error = f" sees another {where} than rank 0's host: a shared file system is required"
    found = world.all_gather([socket.gethostname(), error])
    if leads:
        with contextlib.suppress(Exception):  # it may not even be open
            storage.delete(mine)
            if new and storage.is_local and not storage.list():
                os.rmdir(where)
    return Check.of("run.dir", found, f"{where}: written, read and deleted")


def _network(world: World, floor: float | None) -> list[Check]:
    """Whether all-reduce gives the right sum, and its bandwidth (GB/s); which links between hosts are slow."""
    right, speed = probes.all_reduce(world)
    links = probes.links(world)
    hosts = list(dict.fromkeys(world.all_gather(socket.gethostname())))
    limit = max(SLOW_LINK * sorted(links.values())[len(links) // 2] if links else 0.0, floor or 0.0)
    slow = {pair: value for pair, value in links.items() if value < limit}
    fast = {host for pair in links.keys() - slow.keys() for host in pair}
    bad = [host for host in hosts if any(host in pair for pair in slow)]
    bad = [host for host in bad if host not in fast] or bad
    shown = "; ".join(f"{one} - {other} {_speed(value)}" for (one, other), value in slow.items())
    text = f"{_speed(speed)} bus bandwidth" + (f"; slow: {shown}" if shown else "")
    state = "warn" if slow else "ok"
    if floor is not None and speed < floor:
        state, bad = "FAIL", bad or hosts
        text += f"; expected at least {_speed(floor)} (--min-bandwidth): look at the network of {', '.join(bad)}"
    sums = Check("all-reduce", "ok" if right else "FAIL", "right on all ranks" if right else "the sum is wrong")
    return [sums, Check("bandwidth", state, text, bad)]


def _speed(value: float) -> str:
    return f"{format_bytes(value * 1e9)}/s"


def _samples(world: World, config: Config, split: str) -> Check:
    """The first samples of a split, read on each host."""
    text, error = "", ""
    if world.placement.local_rank == 0:
        try:
            text = dry_run.describe_samples(config, split)
        except Exception as failed:
            error = f" can't read it: {type(failed).__name__}: {failed}"
    found = world.all_gather([socket.gethostname(), error, text])
    return Check.of(f"data.{split}", [(host, wrong) for host, wrong, _ in found], found[0][2])


def _dry_run(world: World, config: Config) -> Check:
    with _scratch(world, config) as where:
        if where is None:
            return Check("dry run", "warn", "skipped: on several hosts it needs a run.dir on a shared file system")
        try:
            lines, warning = dry_run.run(config, world, where)
        except ConfigError:
            raise
        except Exception as error:  # on several processes it has ended them, and was reported
            return Check("dry run", "FAIL", f"{type(error).__name__}: {error}", [socket.gethostname()])
    lines = ["three steps, evaluation, save, resume", *lines, *([f"  warning: {warning}"] if warning else [])]
    return Check("dry run", "warn" if warning else "ok", "\n".join(lines))


@contextlib.contextmanager
def _scratch(world: World, config: Config) -> Iterator[Path | None]:
    """A temporary directory that all ranks share; None if there is none."""
    one_host = world.placement.nodes == 1
    place = None
    if world.is_main and (one_host or os.path.isdir(config.run.place)):
        with contextlib.suppress(OSError):
            place = tempfile.mkdtemp(prefix=".doctor-", dir=None if one_host else config.run.place)
    place = world.broadcast(place)
    try:
        yield None if place is None else Path(place)
    finally:
        if place is not None and world.is_main:
            shutil.rmtree(place, ignore_errors=True)
