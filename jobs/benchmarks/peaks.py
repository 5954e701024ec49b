"""Peak memory of a benchmark's processes by kind; a separate process samples them ten times per second."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

EVERY = 0.1  # seconds between two looks at the processes
Peaks = dict[str, dict[str, float]]  # kind -> megabytes of the largest, of all together, and how many there were


class Watch:
    """Looks at this process and everything that it starts, until `peaks` is called."""

    def __init__(self) -> None:
        self.end, self.results = multiprocessing.Event(), multiprocessing.Queue()
        multiprocessing.Process(target=_watch, args=(os.getpid(), self.end, self.results), daemon=True).start()

    def peaks(self) -> Peaks:
        self.end.set()
        return self.results.get()


def show_peaks(peaks: Peaks) -> None:
    print(f"\n{'peak memory, MB (own, not mapped or shared)':<44}{'largest':>10}{'together':>10}{'number':>8}")
    for kind, peak in sorted(peaks.items(), key=lambda item: -item[1]["together"]):
        print(f"{kind[:43]:<44}{peak['largest']:>10.0f}{peak['together']:>10.0f}{peak['processes']:>8}")


def _watch(root: int, end: Any, results: Any) -> None:
    peaks: dict[str, dict[str, float]] = defaultdict(lambda: {"largest": 0.0, "together": 0.0, "processes": 0})
    while not end.wait(EVERY):
        now: dict[str, list[float]] = defaultdict(list)
        for pid in family(root) - {os.getpid()}:
            if (result := _memory(pid)) is not None:
                now["all processes"].append(result)
                now[kind_of(pid, root)].append(result)
        for kind, sizes in now.items():
            peak = peaks[kind]
            peak["largest"] = max(peak["largest"], round(max(sizes), 1))
            peak["together"] = max(peak["together"], round(sum(sizes), 1))
            peak["processes"] = max(peak["processes"], len(sizes))
    results.put(dict(peaks))


def _memory(pid: int) -> float | None:
    """Megabytes that a process holds for itself: without mapped files, which the kernel drops when it needs the room."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    return int(fields["RssAnon"][0]) / 1024 if "RssAnon" in fields else None


def family(root: int) -> set[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8") if entry.isdigit() else ""
        except OSError:
            continue
        if stat:
            children[int(stat.rpartition(")")[2].split()[1])].append(int(entry))
    result, waiting = set(), [root]
    while waiting:
        pid = waiting.pop()
        result.add(pid)
        waiting += children[pid]
    return result


def kind_of(pid: int, root: int) -> str:
    if pid == root:
        return "driver"
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "other"
    for word, kind in (
        ("ray::", "actor or task: "),
        ("raylet", "raylet"),
        ("gcs_server", "gcs server"),
        ("distill_at_scale.data", "decoder of clips"),
    ):
        if word in name:
            return kind + re.split(r"[.( ]", name.removeprefix("ray::"))[0] if word == "ray::" else kind
    return "other"
