"""A Ray cluster of several hosts on this machine with a shared disk: start, commands, damage, repair.

`head` has no cores and runs the command; each worker host has one core and a supervisor that restarts Ray when it ends, like
systemd or Kubernetes. Token authentication is on. `faults.py` has the faults.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.faults.hosts import NETWORK, Command, Host, Switch, kill

ROOT = Path(__file__).resolve().parents[2]
PORT = 6379
DISK_MIB, STORE_BYTES = 192, 100 * 2**20
READY = 300  # seconds until all nodes are there, on a busy machine
WAIT = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
while sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.2)
"""
RUNS = "pgrep -x -r D,R,S raylet > /dev/null"  # nobody on a host buries the dead
SUPERVISE = f"while :; do {{start}}; while {RUNS}; do sleep 0.5; done; done"  # `ray start --block` outlives its raylet


class Bench:
    """Use it as a context; `folder` gets the logs."""

    def __init__(self, folder: Path, workers: int = 2):
        self.folder = folder
        names = {"head": f"{NETWORK}1"} | {f"worker{i}": f"{NETWORK}{i + 1}" for i in range(1, workers + 1)}
        self.names, self.hosts = names, dict[str, Host]()
        self.switch = Switch(folder / "disk", DISK_MIB)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }  # fmt: skip

    def __enter__(self) -> Bench:
        self.mend()
        return self

    def __exit__(self, *problem: object) -> None:
        self.switch.close()

    @property
    def address(self) -> str:
        return f"{self.names['head']}:{PORT}"

    @property
    def disk(self) -> Path:
        """The shared disk as commands on the hosts name it."""
        return self.switch.disk

    @property
    def head(self) -> Host:
        return self.hosts["head"]

    @property
    def workers(self) -> list[Host]:
        return [host for name, host in self.hosts.items() if name != "head"]

    def mend(self, limit: float = READY) -> None:
        """Start missing hosts and wait until Ray has all of them."""
        until = time.monotonic() + limit
        whole = self._runs("head", "gcs_server")
        for name in list(self.hosts):
            if not whole or not self._runs(name, "raylet"):  # nodes of a lost cluster do not join the next one
                self.lose(self.hosts[name])
        self.replace()
        wait = [sys.executable, "-c", WAIT, self.address, str(len(self.names) - 1)]
        while (asked := self.command(wait, "mend.log")) and _wait(asked, until - time.monotonic()) != 0:
            if time.monotonic() > until:
                raise TimeoutError(f"the cluster was not whole within {limit:.0f} s; see {self.folder}")
            time.sleep(0.5)

    def replace(self) -> None:
        """Put a new host in the place of each one that is gone."""
        for name in self.names:
            if name not in self.hosts:
                self._add(name)

    def lose(self, host: Host) -> None:
        """A host that is gone for good."""
        host.kill()
        del self.hosts[host.name]

    def kill_head(self, spared: Command) -> None:
        """kill -9 of all of Ray on the head at once; the command there is spared."""
        family = set(spared.family())
        for pid in self.head.processes():
            if pid not in family:
                kill(pid)

    def command(self, asked: Sequence[str], log: str) -> Command:
        """Start a command on the head; what it writes is appended to a log in the folder."""
        with open(self.folder / log, "ab") as out:
            return self.head.start(asked, self.environment, out, ROOT)

    def _runs(self, name: str, program: str) -> bool:
        lines = self.hosts[name].processes().values() if name in self.hosts else ()
        return any(line.partition(" ")[0].endswith(f"/{program}") for line in lines)

    def _add(self, name: str) -> None:
        number = int(self.names[name].removeprefix(NETWORK))
        self.hosts[name] = Host(self.switch, name, number, self.folder / "hosts", self.names)
        self.start(name)

    def start(self, name: str) -> None:
        """Start Ray on a host."""
        host = self.hosts[name]
        start = f"ray start --node-ip-address={host.address} --object-store-memory={STORE_BYTES} --disable-usage-stats"
        if name == "head":
            start += f" --head --port={PORT} --num-cpus=0 --include-dashboard=false"
        else:
            start = SUPERVISE.format(start=f"{start} --address={self.address} --num-cpus=1")
        with open(self.folder / f"{name}.log", "ab") as out:
            host.start(["sh", "-c", start], self.environment, out, ROOT)


def _wait(command: Command, seconds: float) -> int | None:
    """The exit status; None where it had to be ended."""
    until = time.monotonic() + seconds
    while (status := command.ended()) is None and time.monotonic() < until:
        time.sleep(0.1)
    if status is None:
        command.kill()
    return status
