"""Hosts on one machine: each has its own network, address, processes, /tmp/ray and /dev/shm, like a real node.

A host is a process in new Linux namespaces. It ends, with everything that runs in it, when that process or its parent ends,
so nothing is left behind. A bridge in one more namespace connects the hosts, so no address is visible outside. Needs root,
`unshare`, `nsenter` and `ip`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

NETWORK = "10.77.0."
DISPOSABLE = ("setpriv", "--pdeathsig", "KILL")  # ends with the process that started it
LIMIT = 20  # seconds for a command that prepares a host


def possible() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if missing := [name for name in ("ip", "unshare", "nsenter", "setpriv", "mount") if shutil.which(name) is None]:
        return f"there is no {missing[0]} here"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "ip", "link", "add", "type", "bridge"],
                           capture_output=True, text=True, timeout=LIMIT)  # fmt: skip
    return (tried.stderr.strip() or f"unshare ended with {tried.returncode}") if tried.returncode else None


class Switch:
    """What hosts are plugged into; also keeps the disk that they share, a tmpfs of some MiB at `disk`."""

    def __init__(self, disk: Path, mib: int):
        self.disk, self.hosts = disk, list[Host]()
        disk.mkdir(parents=True, exist_ok=True)
        prepare = f"mount -t tmpfs -o size={mib}m shared {disk} && ip link add br0 type bridge && ip link set br0 up"
        self.process, self.pid = _namespaces(["unshare", "--net", "--mount", "--pid", "--mount-proc"], prepare)

    @property
    def seen(self) -> Path:
        """The shared disk in this process; a host may have something mounted over it."""
        return Path(f"/proc/{self.pid}/root{self.disk}")

    def close(self) -> None:
        for host in [*self.hosts]:
            host.kill()
        _end(self.process, self.pid)


class Host:
    """A machine of its own, `number` being the last part of its address."""

    def __init__(self, switch: Switch, name: str, number: int, folder: Path, names: Mapping[str, str]):
        self.switch, self.name, self.address = switch, name, f"{NETWORK}{number}"
        own = folder / name
        for part in ("ray", "logs"):
            (own / part).mkdir(parents=True, exist_ok=True)
        (own / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in names.items()), encoding="utf-8"
        )
        prepare = (
            f"hostname {name} && mkdir -p /tmp/ray && mount --bind {own}/ray /tmp/ray && mount -t tmpfs shm /dev/shm && "
            f"mount --bind {own}/hosts /etc/hosts && ip link set lo up"
        )
        new = [*_enter(switch.pid, "--mount"), "unshare", "--net", "--mount", "--pid", "--uts", "--mount-proc"]
        self.process, self.pid = _namespaces(new, prepare)
        self._plug(number)
        switch.hosts.append(self)

    def _plug(self, number: int) -> None:
        port = f"port{number}-{self.pid}"[:15]
        inside = _enter(self.switch.pid, "--net")
        _do([*inside, "ip", "link", "add", port, "type", "veth", "peer", "name", f"e{self.pid}"])
        _do([*inside, "ip", "link", "set", f"e{self.pid}", "netns", f"/proc/{self.pid}/ns/net"])
        _do([*inside, "ip", "link", "set", port, "master", "br0", "up"])
        dress = f"ip link set e{self.pid} name eth0 && ip addr add {self.address}/24 dev eth0 && ip link set eth0 up"
        _do([*_enter(self.pid, "--net"), "sh", "-c", dress])

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes], cwd: Path) -> Command:
        """Start a command on this host; it ends with the host."""
        kinds = ("--net", "--mount", "--pid", "--uts", f"--wdns={cwd}")
        asked = [*DISPOSABLE, *_enter(self.pid, *kinds), *command]
        return Command(subprocess.Popen(asked, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(environment)))

    def processes(self) -> dict[int, str]:
        """Command lines by the pid outside, of all that runs here but the host itself."""
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        result = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns" / "pid") == here:
                        result[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return result

    def cut(self, off: bool) -> None:
        """Take the network cable out, or put it in again."""
        _do([*_enter(self.pid, "--net"), "ip", "link", "set", "eth0", "down" if off else "up"])

    def refuse_writes(self, refuse: bool) -> None:
        """Whether the shared disk can only be read from here (EROFS); files that are open stay writable."""
        disk = str(self.switch.disk)
        asked = ["mount", "-o", "bind,ro", disk, disk] if refuse else ["umount", "--lazy", disk]
        _do([*_enter(self.pid, "--mount", "--pid"), *asked])

    def kill(self) -> None:
        """As if its power were cut."""
        if self in self.switch.hosts:
            self.switch.hosts.remove(self)
        _end(self.process, self.pid)


class Command:
    """A command that runs on a host."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process = process  # nsenter, whose child the command is

    def ended(self) -> int | None:
        return self.process.poll()

    def family(self) -> list[int]:
        """Its pids outside, the eldest first."""
        result = [self.process.pid]
        for pid in result:
            with contextlib.suppress(OSError):
                result += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split())
        return result

    def kill(self) -> None:
        """kill -9 of the command alone, not of what it has started."""
        for pid in self.family()[1:2]:
            kill(pid)
        self.process.wait(LIMIT)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _enter(pid: int, *kinds: str) -> list[str]:
    return ["nsenter", "--target", str(pid), *kinds, "--"]


def _namespaces(command: Sequence[str], prepare: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that sleeps in new namespaces once they are prepared, and its pid outside."""
    shell = ["sh", "-c", f"{prepare} && echo ready && exec sleep infinity"]
    asked = [*DISPOSABLE, *command, "--fork", "--kill-child", "--", *shell]
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    if (messages := process.stdout.readline()) != b"ready\n":
        raise RuntimeError(f"no namespaces: {messages.decode().strip()} ({' '.join(command)})")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return process, int(children[0])


def _end(process: subprocess.Popen[bytes], pid: int) -> None:
    if process.poll() is None:
        kill(pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT)
        kill(process.pid)
    process.wait()


def _do(command: Sequence[str]) -> None:
    for left in (2, 1, 0):
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        if done.returncode == 0:
            return
        if not left:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        time.sleep(0.2)  # the disk or the interface was in use for a moment
