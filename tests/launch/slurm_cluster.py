"""A real Slurm with a few virtual nodes on this machine, for the duration of some tests. Needs root and Debian's packages.

Nothing of the system's configuration is touched: configuration, key, sockets, spools and logs lie in one directory. All
nodes share the host's name, so that their own names aren't names of hosts, and meet on loopback.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from runs import forks_workers

COMMANDS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo", "squeue")
FREEZER = Path("/sys/fs/cgroup/freezer")

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
FirstJobId={first}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
PropagateResourceLimits=NONE
{nodes}
PartitionName=debug Nodes=node[1-{count}] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why a cluster can't run here; None if it can."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (Debian: munge slurmctld slurmd slurm-client)" if absent else None


def wait_for(what: str, check: Callable[[], bool], timeout: float, every: float = 0.2) -> None:
    """Poll until `check` holds, `every` so many seconds; AssertionError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(every)


def _gone(process: Path) -> bool:
    """Whether a process, by its folder in /proc, has ended; its new parent may look for it only every few seconds."""
    return not process.exists() or "\nState:\tZ" in (process / "status").read_text()


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are currently free on loopback."""
    for first in range(17000 + os.getpid() % 1000 * 10, 32000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")


class SlurmCluster:
    """munged, slurmctld and one slurmd per node; `root` must be short (it holds sockets)."""

    def __init__(self, root: Path, nodes: int = 2, cpus: int = 8):
        self.root, self.nodes, self.cpus = root, nodes, cpus
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons and wait until all nodes are idle."""
        root, port = self.root, free_ports(self.nodes + 1)
        host = socket.gethostname().split(".")[0]
        cgroup = os.access(FREEZER / "cgroup.procs", os.W_OK)
        nodes = "\n".join(
            f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + i} CPUs={self.cpus} RealMemory=1024"
            for i in range(1, self.nodes + 1)
        )
        proctrack = "cgroup" if cgroup else "linuxproc"
        first = os.getpid() % 1000 * 10 + 1  # ports are derived from job IDs: another cluster may be on this machine
        text = CONFIG.format(
            host=host, root=root, port=port, first=first, proctrack=proctrack, nodes=nodes, count=self.nodes
        )
        (root / "slurm.conf").write_text(text)
        mounts = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n"
        (root / "cgroup.conf").write_text(mounts if cgroup else "")
        (root / "state").mkdir()
        (root / "munge.key").write_bytes(secrets.token_bytes(1024))
        (root / "munge.key").chmod(0o600)
        files = [f"--{name}={root}/munge.{suffix}" for name, suffix in (("socket", "socket"), ("key-file", "key"))]
        files += [f"--{name}={root}/munged.{name[:3]}" for name in ("pid-file", "log-file", "seed-file")]
        self._daemon("munged", "--force", "--num-threads=2", *files)
        self._daemon("slurmctld", "-c", "-i")
        for i in range(1, self.nodes + 1):
            (root / f"spool.node{i}").mkdir()
            self._daemon("slurmd", "-N", f"node{i}")
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")
        wait_for("all nodes idle", lambda: self.run(*idle).strip() == str(self.nodes), 60)

    def _daemon(self, *command: str) -> None:
        with (self.root / "daemons.log").open("ab") as log:
            subprocess.run(command, env=self.env, stdout=log, stderr=log, check=True, timeout=60)

    def stop(self) -> None:
        """End all jobs, then kill the daemons that `start` started, by their process ids: nobody needs their state."""
        self.run("scancel", "--signal=KILL", "--full", "--user=root")
        self.run("scancel", "--user=root")
        with contextlib.suppress(AssertionError):
            wait_for("no jobs", lambda: not self.run("squeue", "-h").strip(), 20)
        for name in [*(f"slurmd.node{i}" for i in range(1, self.nodes + 1)), "slurmctld", "munged"]:
            file = self.root / f"{name}.pid"
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pid = int(file.read_text())
                if Path(f"/proc/{pid}/comm").read_text().strip() == name.split(".")[0]:
                    os.kill(pid, signal.SIGKILL)
                    process = Path(f"/proc/{pid}")
                    with contextlib.suppress(AssertionError):
                        wait_for(f"{name} gone", functools.partial(_gone, process), 20)

    def run(self, *command: str) -> str:
        """Run a Slurm command; return its output, empty if it failed."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=180).stdout

    def submit(self, cwd: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """sbatch in `cwd`; return the job ID."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=cwd,
            env={**self.env, **forks_workers(), **(env or {})},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The output of `scontrol show job` for a job (for an array task: ID_TASK)."""
        words = self.run("scontrol", "show", "job", number, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, timeout: float = 300) -> dict[str, str]:
        """Wait until a job has ended; return Slurm's record of it."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_for(f"job {number} over", lambda: self.job(number)["JobState"] in over, timeout, every=0.5)
        return self.job(number)
