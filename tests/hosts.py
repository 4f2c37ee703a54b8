"""Hosts in network namespaces of this machine: a link each on one bridge, a name and a mount table of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from runs import environment

NET = "10.79.0"


def missing() -> str | None:
    """Why there can be none."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc", "unshare", "mount") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True)
    return None if tried.returncode == 0 else "namespaces aren't allowed here"


class Hosts:
    """`count` hosts, h1 ...; `start` runs a process on one of them."""

    def __init__(self, count: int, folder: Path):
        self.count, self.folder = count, folder
        self._name = f"f{os.getpid() % 100000}x"
        names = "".join(f"{NET}.{i} h{i}\n" for i in range(1, count + 1))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (folder / "nsswitch.conf").write_text("hosts: files\n")
        switch = self._name + "0"
        self._ip("netns", "add", switch)
        self._ip("-n", switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", switch, "link", "set", "br0", "up")
        for i in range(1, count + 1):
            host = f"{self._name}{i}"
            self._ip("netns", "add", host)
            self._ip("-n", switch, "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", host)
            self._ip("-n", switch, "link", "set", f"port{i}", "master", "br0", "up")
            self._ip("-n", host, "addr", "add", f"{NET}.{i}/24", "dev", "eth0")
            self._ip("-n", host, "link", "set", "eth0", "up")
            self._ip("-n", host, "link", "set", "lo", "up")

    def run(self, i: int, *command: str, before: str = "", **env: str) -> subprocess.Popen[str]:
        """A command on host i; `before` is a shell command run there first."""
        prepare = (
            f"hostname h{i} && mount --bind {self.folder}/hosts /etc/hosts && "
            f'mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf && {before or "true"} && exec "$@"'
        )
        inside = ["ip", "netns", "exec", f"{self._name}{i}", "unshare", "--uts", "--mount", "sh", "-c", prepare, "sh"]
        return subprocess.Popen(
            [*inside, *command],
            cwd=self.folder, env=environment(**env), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def torchrun(self, i: int, *arguments: str, before: str = "", **env: str) -> subprocess.Popen[str]:
        """One process of a job of `count` nodes on host i."""
        job = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.count}", "--nproc_per_node=1"),
            *(f"--node_rank={i - 1}", "--rdzv_backend=c10d", "--rdzv_endpoint=h1:29400", "--rdzv_id=job"),
            *("-m", "dist_train.main", *arguments),
        ]
        return self.run(i, *job, before=before, **env)

    def pids(self, i: int) -> list[int]:
        """The processes on host i."""
        listed = subprocess.run(["ip", "netns", "pids", f"{self._name}{i}"], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def crash(self, i: int) -> None:
        """Kill all processes of host i at once."""
        for pid in self.pids(i):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def cut(self, i: int) -> None:
        """Pull host i's cable: its packets vanish, and nobody is told."""
        self._ip("-n", self._name + "0", "link", "set", f"port{i}", "down")

    def heal(self, i: int) -> None:
        """Plug it in again."""
        self._ip("-n", self._name + "0", "link", "set", f"port{i}", "up")

    def slow(self, i: int, rate: str) -> None:
        """Let host i's link carry no more than `rate`."""
        for space, device in ((f"{self._name}{i}", "eth0"), (self._name + "0", f"port{i}")):
            limit = [
                "tc",
                "qdisc",
                "replace",
                "dev",
                device,
                "root",
                "tbf",
                "rate",
                rate,
                *("burst", "64kb", "latency", "1s"),
            ]
            subprocess.run(["ip", "netns", "exec", space, *limit], check=True, capture_output=True)

    def close(self) -> None:
        """End what runs on them, and take them away."""
        for i in range(self.count + 1):
            self.crash(i)
            subprocess.run(["ip", "netns", "del", f"{self._name}{i}"], capture_output=True)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)
