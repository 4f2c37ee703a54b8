"""`doctor`: what a job needs, looked at on all its hosts before it starts; names the host that lacks it."""

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import Parser, whole_file, with_config
from dist_train.config.errors import ConfigError, mask, visible
from dist_train.watch.failure import write_error_file

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

SHARED_MEMORY = 64 << 20  # bytes: loader workers hand batches over in it
FILES = 1024
CLOCKS = 2.0  # seconds
SLOW_LINK = 0.25  # of the usual link


@dataclass
class Check:
    """One thing that was looked at.

    Attributes:
        state: `ok`, `warn` (a job may run) or `FAIL`. hosts: those that are to blame.
    """

    name: str
    state: str
    text: str
    hosts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, complaints: Iterable[tuple[str, str]], fine: str) -> Check:
        """The check that fails for each host with a complaint, and says the first one."""
        bad = [(host, text) for host, text in complaints if text]
        if not bad:
            return cls(name, "ok", fine)
        hosts = list(dict.fromkeys(host for host, _ in bad))
        return cls(
            name, "FAIL", f"{bad[0][0]}{bad[0][1]}" + (f" (so too {', '.join(hosts[1:])})" if hosts[1:] else ""), hosts
        )


def main(arguments: Sequence[str]) -> int:
    """Look at everything; 0 if a job may start, 1 if not, 2 if the config is wrong."""
    parser = Parser("doctor", "Whether all hosts are fit for a job; start it on them as the job would be started.")
    parser.add_argument("--min-bandwidth", type=float, metavar="GB/s", help="fail below this all-reduce bus bandwidth")
    parser.add_argument("--json", metavar="FILE", help="write what was found")
    options = with_config(parser, arguments)

    from dist_train.config.fields import Duration
    from dist_train.config.schema import DistributedConfig
    from dist_train.run.api import checked
    from dist_train.runtime.launch import read_placement
    from dist_train.runtime.world import open_world

    config, problem = None, None
    try:
        config = checked(options.config, options.overrides)
    except ConfigError as error:
        problem = error
    distributed = config.distributed if config is not None else DistributedConfig()
    patience = Duration(min(60.0, distributed.hang_timeout.value), "s")
    began = time.monotonic()
    with open_world(distributed.model_copy(update={"hang_timeout": patience}), read_placement(os.environ)) as world:
        checks, ranks = _examine(world, config, problem, options)
        if config is not None and options.config is not None:
            _write(world, options.json, [*checks, Check("rehearsal", "FAIL", "it didn't come to its end")], ranks)
            checks.append(_rehearsal(world, config))
        checks = [Check(**check) for check in world.broadcast([asdict(check) for check in checks])]
        _write(world, options.json, checks, ranks)
        if world.is_main:
            _print(checks, ranks, time.monotonic() - began)
        return int(any(check.state == "FAIL" for check in checks))


def _examine(
    world: World, config: Config | None, problem: ConfigError | None, options: Any
) -> tuple[list[Check], list[dict[str, Any]]]:
    """Every check but the rehearsal (rank 0's list counts), and the facts of each rank."""
    from dist_train.doctor import probes

    mine = {**probes.resources(world.device), "versions": probes.versions(), "problem": str(problem or "")}
    if config is not None:
        plain = config.to_dict()
        del plain["run"]["code_paths"]  # the user's code may lie elsewhere on each host
        mine["versions"]["config"] = hashlib.sha256(
            json.dumps(plain, sort_keys=True, default=str).encode()
        ).hexdigest()[:12]
    ranks = world.all_gather(mine)
    if problem is not None and all(rank["problem"] for rank in ranks):
        raise problem
    for rank, offset in zip(ranks, probes.clock_offsets(world)):
        rank["clock_offset"] = round(offset, 4)
    checks = [
        _same(name, [(rank["host"], rank["versions"].get(name, "none")) for rank in ranks]) for name in mine["versions"]
    ]
    if any(rank["problem"] for rank in ranks):
        wrong = [(rank["host"], rank["problem"] and f" only: {rank['problem']}") for rank in ranks]
        checks.append(Check.of("config", wrong, ""))
    checks += [
        _room("/dev/shm", "shm", SHARED_MEMORY, ranks, "loader workers need it: empty it, or docker run --shm-size=8g"),
        _room("open files", "files", FILES, ranks, f"ulimit -n {FILES} or more: loader workers and sockets need them"),
        _clocks(ranks),
        _storage(world, config.run.place if config is not None else "runs"),
    ]
    if world.size > 1:
        checks += _network(world, options.min_bandwidth)
    if config is not None and options.config is not None:
        splits = [split for split in ("train", "val", "test") if getattr(config.data, split) is not None]
        checks += [_samples(world, config, split) for split in splits]
    return checks, ranks


def _same(name: str, values: list[tuple[str, str]]) -> Check:
    (usual, _), *_ = Counter(value for _, value in values).most_common(1)  # of equally many, rank 0's
    told = [
        (host, f" has {value}, the others have {usual}: make them the same") for host, value in values if value != usual
    ]
    return Check.of(name, told, usual)


def _room(name: str, key: str, least: int, ranks: list[dict[str, Any]], cure: str) -> Check:
    def amount(value: float) -> str:
        return f"{size(value)} free" if key == "shm" else str(value)

    known = [rank for rank in ranks if key in rank]
    told = [
        (rank["host"], f": {amount(rank[key])}, expected {amount(least)} at least; {cure}")
        for rank in known
        if 0 <= rank[key] < least
    ]
    return Check.of(
        name, told, f"{amount(min(rank[key] for rank in known))} at least" if known else "not on this system"
    )


def _clocks(ranks: list[dict[str, Any]]) -> Check:
    offsets = sorted(rank["clock_offset"] for rank in ranks)
    spread, usual = offsets[-1] - offsets[0], offsets[len(offsets) // 2]
    late = [rank["host"] for rank in ranks if abs(rank["clock_offset"] - usual) > CLOCKS]
    told = [(host, f"'s clock is apart by up to {spread:.1f} s: start NTP there") for host in late]
    return Check.of("clocks", told, f"within {spread * 1e3:.0f} ms")


def _storage(world: World, where: str) -> Check:
    """Write, read and delete in the directory of the runs, from each host; whether all see the same one."""
    from dist_train.runtime.storage import open_storage

    name = world.broadcast(f".doctor-{secrets.token_hex(6)}")
    mine, error, leads = f"{name}-{world.rank}", "", world.placement.local_rank == 0
    if leads:
        try:
            storage = open_storage(where, patience=2.0)
            new = not storage.exists("")
            storage.makedirs()
            storage.write_atomic(mine, b"doctor")
            if storage.read_bytes(mine) != b"doctor":
                error = ": what was read isn't what was written"
        except Exception as failed:
            error = f": {failed}; give run.dir a place that every host may write to"
    world.barrier()
    if leads and not error:
        with contextlib.suppress(Exception):
            if not storage.exists(f"{name}-0"):
                error = f" has another {where} than rank 0's host: a shared file system is needed"
    found = world.all_gather([socket.gethostname(), error])
    if leads:
        with contextlib.suppress(Exception):  # what couldn't be opened, too
            storage.delete(mine)
            if new and storage.is_local and not storage.list():
                os.rmdir(where)
    return Check.of("run.dir", [(host, text) for host, text in found], f"{where}: written, read and deleted")


def _network(world: World, floor: float | None) -> list[Check]:
    from dist_train.doctor import probes

    right, speed = probes.all_reduce(world)
    links = probes.links(world)
    hosts = list(dict.fromkeys(world.all_gather(socket.gethostname())))
    usual = sorted(links.values())[len(links) // 2] if links else 0.0
    limit = max(SLOW_LINK * usual, floor or 0.0)
    slow = {pair: value for pair, value in links.items() if value < limit}
    fast = {host for pair in links.keys() - slow.keys() for host in pair}
    bad = [host for host in hosts if any(host in pair for pair in slow)]
    bad = [host for host in bad if host not in fast] or bad
    told = "; ".join(f"{one} - {other} {_speed(value)}" for (one, other), value in slow.items())
    text = f"{_speed(speed)} bus bandwidth" + (f"; slow: {told}" if told else "")
    state = "warn" if slow else "ok"
    if floor is not None and speed < floor:
        state, bad = "FAIL", bad or hosts
        text += f"; expected {_speed(floor)} at least (--min-bandwidth): look at the network of {', '.join(bad)}"
    sums = Check("all-reduce", "ok" if right else "FAIL", "right on all ranks" if right else "the sum is wrong")
    return [sums, Check("bandwidth", state, text, bad)]


def _samples(world: World, config: Config, split: str) -> Check:
    """The first samples of a split, read on each host."""
    from dist_train.doctor.dry_run import look_at

    text, error = "", ""
    if world.placement.local_rank == 0:
        try:
            text = look_at(config, split)
        except Exception as failed:
            error = f" can't read it: {type(failed).__name__}: {failed}"
    found = world.all_gather([socket.gethostname(), error, text])
    return Check.of(f"data.{split}", [(host, wrong) for host, wrong, _ in found], found[0][2])


def _rehearsal(world: World, config: Config) -> Check:
    from dist_train.doctor.dry_run import rehearse

    with _scratch(world, config) as where:
        if where is None:
            return Check("rehearsal", "warn", "left out: several hosts need a run.dir on a shared file system for it")
        try:
            lines, forgotten = rehearse(config, world, where)
        except ConfigError:
            raise
        except Exception as error:  # with several processes it has ended them, and was told
            return Check("rehearsal", "FAIL", f"{type(error).__name__}: {error}", [socket.gethostname()])
    state, told = ("warn", [f"  warning: {forgotten}"]) if forgotten else ("ok", [])
    return Check("rehearsal", state, "\n".join(["three steps, evaluation, save, resume", *lines, *told]))


@contextlib.contextmanager
def _scratch(world: World, config: Config) -> Iterator[Path | None]:
    """A directory that all ranks share for a moment; None if there is none."""
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


def _write(world: World, path: str | None, checks: list[Check], ranks: list[dict[str, Any]]) -> None:
    if path is None or not world.is_main:
        return
    failed, hosts = _blamed(checks)
    content = {"ok": not failed, "world_size": world.size, "bad_hosts": hosts}
    content |= {"checks": [asdict(check) for check in checks], "ranks": ranks}
    with whole_file(path, "--json") as part:
        part.write_text(json.dumps(_masked(content), indent=2) + "\n", encoding="utf-8")


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _masked(inner) for name, inner in value.items()}
    return (
        [_masked(inner) for inner in value]
        if isinstance(value, list)
        else mask(value)
        if isinstance(value, str)
        else value
    )


def _blamed(checks: list[Check]) -> tuple[list[str], list[str]]:
    """The names of the checks that failed, and the hosts that are to blame."""
    failed = [check for check in checks if check.state == "FAIL"]
    return [check.name for check in failed], list(dict.fromkeys(host for check in failed for host in check.hosts))


def _print(checks: list[Check], ranks: list[dict[str, Any]], seconds: float) -> None:
    width = max(4, *(len(rank["host"]) for rank in ranks))
    print(f"rank  {'host':<{width}}  {'free memory':<20}  {'/dev/shm':<9}  {'clock':<8}  device")
    for number, rank in enumerate(ranks):
        memory, shm = f"{size(rank['free'])} of {size(rank['total'])}", size(rank["shm"]) if "shm" in rank else "-"
        place = f"{number:>4}  {rank['host']:<{width}}  {memory:<20}  {shm:<9}"
        print(f"{place}  {rank['clock_offset']:+.3f} s  {rank['device']}")
    print()
    left = max(len(check.name) for check in checks)
    for check in checks:
        text = visible(mask(check.text)).replace("\n", "\n" + " " * (left + 8))
        print(f"{check.state:<4}  {check.name:<{left}}  {text}")
    failed, hosts = _blamed(checks)
    verdict = f"not fit: {', '.join(failed)}" if failed else "fit for a job"
    verdict += f"; look at {', '.join(hosts)}" if hosts else ""
    print(f"\ndoctor: {verdict} ({len(ranks)} rank(s), {seconds:.1f} s)", flush=True)
    if failed:
        write_error_file(f"doctor: {verdict}", "")


def _speed(value: float) -> str:
    return f"{size(value * 1e9)}/s"


def size(value: float) -> str:
    """`12.3 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
