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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import Parser, with_config
from dist_train.config.errors import ConfigError
from dist_train.runtime.failure import write_error_file

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

SHARED_MEMORY = 64 << 20  # bytes: loader workers hand batches over in it
FILES = 1024
CLOCKS = 2.0  # seconds
SLOW_LINK = 0.25  # of the usual link
SIZES = ("B", "kB", "MB", "GB", "TB")


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


def main(arguments: Sequence[str]) -> int:
    """Look at everything; 0 if a job may start, 1 if not, 2 if the config is wrong."""
    parser = Parser("doctor", "Whether all hosts are fit for a job; start it on them as the job would be started.")
    parser.add_argument("--min-bandwidth", type=float, metavar="GB/s", help="fail below this all-reduce bus bandwidth")
    parser.add_argument("--json", metavar="FILE", help="write what was found")
    options = with_config(parser, arguments)
    config, problem = _load(options.config, options.overrides)

    from dist_train.config.durations import Duration
    from dist_train.config.schema import DistributedConfig
    from dist_train.runtime.world import open_world, read_placement

    distributed = config.distributed if config is not None else DistributedConfig()
    patience = Duration(min(60.0, distributed.hang_timeout.value), "s")
    began = time.monotonic()
    placement = read_placement(os.environ)
    with open_world(distributed.model_copy(update={"hang_timeout": patience}), placement) as world:
        checks, ranks = _examine(world, config, problem, options)
        if config is not None and options.config is not None:
            _write(world, options.json, [*checks, Check("rehearsal", "FAIL", "it didn't come to its end")], ranks)
            checks += _rehearsal(world, config)
        checks = [Check(**check) for check in world.share([asdict(check) for check in checks])]
        _write(world, options.json, checks, ranks)
        if world.is_main:
            _print(checks, ranks, time.monotonic() - began)
        return int(any(check.state == "FAIL" for check in checks))


def _load(source: str | None, overrides: Sequence[str]) -> tuple[Config | None, ConfigError | None]:
    from dist_train.commands.train import checked

    try:
        return checked(source, overrides), None
    except ConfigError as error:
        return None, error


def _examine(
    world: World, config: Config | None, problem: ConfigError | None, options: Any
) -> tuple[list[Check], list[dict[str, Any]]]:
    """Every check but the rehearsal (rank 0's list counts), and the facts of each rank."""
    from dist_train.runtime import probes

    mine: dict[str, Any] = {**probes.resources(world.device), "versions": probes.versions()}
    mine["problem"] = str(problem) if problem is not None else ""
    if config is not None:
        text = json.dumps(_without_paths(config.to_dict()), sort_keys=True, default=str)
        mine["versions"]["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    ranks = world.gather(mine)
    hosts = [rank["host"] for rank in ranks]
    wrong = [rank["host"] for rank in ranks if rank["problem"]]
    if len(wrong) == world.size and problem is not None:
        raise problem
    checks = [_same(name, [rank["versions"].get(name, "none") for rank in ranks], hosts) for name in mine["versions"]]
    if wrong:
        text = next(rank["problem"] for rank in ranks if rank["problem"])
        checks.append(Check("config", "FAIL", f"wrong on {_names(wrong)} only: {text}", _unique(wrong)))
    checks += [
        _room("/dev/shm", "shm", SHARED_MEMORY, ranks, "loader workers need it: empty it, or docker run --shm-size=8g"),
        _room("open files", "files", FILES, ranks, f"ulimit -n {FILES} or more: loader workers and sockets need them"),
    ]
    offsets = probes.clock_offsets(world)
    late = [host for host, offset in zip(hosts, offsets) if abs(offset - sorted(offsets)[len(offsets) // 2]) > CLOCKS]
    spread = max(offsets) - min(offsets)
    text = (
        f"{_names(late)} differ by up to {spread:.1f} s: start NTP there" if late else f"within {spread * 1e3:.0f} ms"
    )
    checks.append(Check("clocks", "FAIL" if late else "ok", text, _unique(late)))
    for rank, offset in zip(ranks, offsets):
        rank["clock_offset"] = round(offset, 4)
    checks += _storage(world, config)
    if world.size > 1:
        checks += _network(world, options.min_bandwidth)
    if config is not None and options.config is not None:
        checks += _samples(world, config)
    return checks, ranks


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Without the directories of the user's code, which may lie elsewhere on each host."""
    return {**config, "run": {key: value for key, value in config["run"].items() if key != "code_paths"}}


def _same(name: str, values: Sequence[str], hosts: Sequence[str]) -> Check:
    counts = Counter(values)
    usual = values[0] if counts[values[0]] == max(counts.values()) else counts.most_common(1)[0][0]
    if len(counts) == 1:
        return Check(name, "ok", usual)
    bad = _unique(host for host, value in zip(hosts, values) if value != usual)
    told = "; ".join(f"{host} has {values[list(hosts).index(host)]}" for host in bad)
    return Check(name, "FAIL", f"{told}, the others have {usual}: make them the same", bad)


def _room(name: str, key: str, least: int, ranks: list[dict[str, Any]], cure: str) -> Check:
    known = [rank for rank in ranks if key in rank]
    bad = [rank for rank in known if 0 <= rank[key] < least]
    amount = (lambda value: size(value) + " free") if key == "shm" else str
    if bad:
        told = _names(_unique(rank["host"] for rank in bad))
        return Check(
            name, "FAIL", f"{told}: {amount(bad[0][key])}, expected {amount(least)} at least; {cure}",
            _unique(rank["host"] for rank in bad),
        )  # fmt: skip
    return Check(name, "ok", f"{amount(min(rank[key] for rank in known))} at least" if known else "not on this system")


def _storage(world: World, config: Config | None) -> list[Check]:
    """Write, read and delete in the directory of the runs, from each host; whether all see the same one."""
    from dist_train.runtime.storage import Storage

    where = config.run.dir if config is not None else "runs"
    name = world.share(f".doctor-{secrets.token_hex(6)}")
    error, seen = "", True
    leads = world.placement.local_rank == 0
    if leads:
        try:
            storage = Storage(where, patience=2.0)
            new = not storage.exists("")
            mine = f"{name}-{world.rank}"
            storage.makedirs()
            storage.write_atomic(mine, b"doctor")
            if storage.read_bytes(mine) != b"doctor":
                error = "what was read isn't what was written"
        except Exception as failed:
            error = str(failed)
    world.barrier()
    if leads and not error:
        with contextlib.suppress(Exception):
            seen = storage.exists(f"{name}-0")
    found = world.gather([socket.gethostname(), error, seen])
    if leads and not error:
        with contextlib.suppress(Exception):
            storage.delete(f"{name}-{world.rank}")
            if new and storage.is_local and not storage.list():
                os.rmdir(where)
    bad = [(host, text) for host, text, _ in found if text]
    if bad:
        text = f"{bad[0][0]}: {bad[0][1]}; give run.dir a place that every host may write to"
        return [Check("run.dir", "FAIL", text, _unique(host for host, _ in bad))]
    blind = _unique(host for host, _, saw in found if not saw)
    if blind:
        text = f"{where} on {_names(blind)} isn't the directory that {found[0][0]} writes to: a shared file system is needed"
        return [Check("run.dir", "FAIL", text, blind)]
    return [Check("run.dir", "ok", f"{where}: written, read and deleted")]


def _network(world: World, floor: float | None) -> list[Check]:
    from dist_train.runtime import probes

    right, speed = probes.all_reduce(world)
    links = probes.links(world)
    hosts = _unique(host for host, _ in world.gather([socket.gethostname(), 0]))
    checks = [Check("all-reduce", "ok" if right else "FAIL", "right on all ranks" if right else "the sum is wrong")]
    usual = sorted(links.values())[len(links) // 2] if links else 0.0
    limit = max(SLOW_LINK * usual, floor or 0.0) if links else 0.0
    fast = {host for pair, value in links.items() if value >= limit for host in pair}
    slow = {pair: value for pair, value in links.items() if value < limit}
    bad = [host for host in hosts if any(host in pair for pair in slow) and host not in fast]
    bad = bad or _unique(host for pair in slow for host in pair)
    told = "; ".join(f"{one} - {other} {_speed(value)}" for (one, other), value in slow.items())
    text = f"{_speed(speed)} bus bandwidth" + (f"; slow: {told}" if told else "")
    if floor is not None and speed < floor:
        bad = bad or hosts
        text += f"; expected {_speed(floor)} at least (--min-bandwidth): look at the network of {_names(bad)}"
        return [*checks, Check("bandwidth", "FAIL", text, bad)]
    return [*checks, Check("bandwidth", "warn" if slow else "ok", text, bad if slow else [])]


def _samples(world: World, config: Config) -> list[Check]:
    """The first samples of each split, read on each host."""
    from dist_train.engine.rehearsal import look_at

    checks = []
    for split in ("train", "val", "test"):
        if getattr(config.data, split) is None:
            continue
        text, failed = "", False
        if world.placement.local_rank == 0:
            try:
                text = look_at(config, split)
            except Exception as error:
                text, failed = f"{type(error).__name__}: {error}", True
        found = world.gather([socket.gethostname(), text, failed])
        bad = [(host, told) for host, told, wrong in found if wrong]
        if bad:
            told = f"{bad[0][0]} can't read it: {bad[0][1]}"
            checks.append(Check(f"data.{split}", "FAIL", told, _unique(host for host, _ in bad)))
        else:
            checks.append(Check(f"data.{split}", "ok", found[0][1]))
    return checks


def _rehearsal(world: World, config: Config) -> list[Check]:
    from dist_train.engine.rehearsal import rehearse

    with _scratch(world, config) as where:
        if where is None:
            return [Check("rehearsal", "warn", "left out: several hosts need a run.dir on a shared file system for it")]
        try:
            lines = rehearse(config, world, where)
        except ConfigError:
            raise
        except Exception as error:  # with several processes it has ended them, and was told
            return [Check("rehearsal", "FAIL", f"{type(error).__name__}: {error}", [socket.gethostname()])]
    return [Check("rehearsal", "ok", "\n".join(["two steps, evaluation, save, resume", *lines]))]


@contextlib.contextmanager
def _scratch(world: World, config: Config) -> Iterator[Path | None]:
    """A directory that all ranks share for a moment; None if there is none."""
    from dist_train.runtime.storage import is_url

    one_host = world.size == world.placement.local_size
    above = None if one_host else config.run.dir
    if above is not None and (is_url(above) or not os.path.isdir(above)):
        above = ""
    place = None
    if above != "" and world.is_main:
        with contextlib.suppress(OSError):
            place = tempfile.mkdtemp(prefix=".doctor-", dir=above)
    place = world.share(place)
    try:
        yield None if place is None else Path(place)
    finally:
        if place is not None and world.is_main:
            shutil.rmtree(place, ignore_errors=True)


def _write(world: World, path: str | None, checks: list[Check], ranks: list[dict[str, Any]]) -> None:
    if path is None or not world.is_main:
        return
    bad = _unique(host for check in checks if check.state == "FAIL" for host in check.hosts)
    content = {
        "ok": all(check.state != "FAIL" for check in checks),
        "world_size": world.size,
        "bad_hosts": bad,
        "checks": [asdict(check) for check in checks],
        "ranks": ranks,
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _print(checks: list[Check], ranks: list[dict[str, Any]], seconds: float) -> None:
    width = max(4, *(len(rank["host"]) for rank in ranks))
    print(f"rank  {'host':<{width}}  {'free memory':<20}  {'/dev/shm':<9}  {'clock':<8}  device")
    for number, rank in enumerate(ranks):
        memory = f"{size(rank['free'])} of {size(rank['total'])}"
        shm = size(rank["shm"]) if "shm" in rank else "-"
        print(
            f"{number:>4}  {rank['host']:<{width}}  {memory:<20}  {shm:<9}  {rank['clock_offset']:+.3f} s  {rank['device']}"
        )
    print()
    left = max(len(check.name) for check in checks)
    for check in checks:
        first, *rest = check.text.splitlines() or [""]
        print(
            "\n".join([f"{check.state:<4}  {check.name:<{left}}  {first}", *(" " * (left + 8) + line for line in rest)])
        )
    bad = _unique(host for check in checks if check.state == "FAIL" for host in check.hosts)
    failed = [check.name for check in checks if check.state == "FAIL"]
    verdict = (
        f"not fit: {', '.join(failed)}" + (f"; look at {_names(bad)}" if bad else "") if failed else "fit for a job"
    )
    print(f"\ndoctor: {verdict} ({len(ranks)} rank(s), {seconds:.1f} s)", flush=True)
    if failed:
        write_error_file(f"doctor: {verdict}", "")


def _speed(value: float) -> str:
    return f"{value:.3g} GB/s" if value >= 0.1 else f"{value * 1e3:.3g} MB/s"


def size(value: float) -> str:
    """`12.3 GB`."""
    power = 0
    while value >= 1000 and power < len(SIZES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {SIZES[power]}"


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(_unique(hosts))
