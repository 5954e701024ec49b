"""The body of the command `init`: looks at the data, chooses settings that fit the budget, and writes a commented file.

The options and the data are checked before torch is loaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from distill_at_scale.config.explain import suggest
from distill_at_scale.config.fields import Section
from distill_at_scale.config.methods import DistillSection
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.inspection.inspect import inspect
from distill_at_scale.storage.filesystem import is_uri, last_name, redact_uri

UNIT_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def init(
    path: str,
    display: Display,
    *,
    source: str | None = None,
    method: str = "dm",
    ipc: int = 1,
    budget: str = "10min",
    out: Path | None = None,
    force: bool = False,
    seed: int = 0,
) -> Path:
    """Look at the data, say what they are, and write a configuration whose first run fits the budget.

    Args:
        path: a folder, a Parquet file, a pattern of shards, or a URI.
        source: a source's name or package.module:Object; None takes the one that fits.
        out: the file to write; None names it after the data, the method and ipc.
        force: overwrite an existing file.

    Returns:
        The path of the file.

    Raises:
        UserError: the data cannot be read, an option is wrong, or the file exists.
    """
    seconds = parse_budget(budget)
    check_method(method, ipc)
    if redact_uri(path) != path:
        raise UserError("--data holds credentials, which a configuration must not; set them in the environment instead")
    if path != path.encode(errors="ignore").decode():
        raise UserError(f"--data {path}: the name is not UTF-8, which a configuration must be; rename the folder")
    name = "_".join([_file_name(path), _file_name(method), f"ipc{ipc}"])
    file = out or Path(f"{name}.yaml")
    if file.is_dir():
        raise UserError(f"--out {file} is a folder; name a file in it")
    if file.exists() and not force:
        raise UserError(f"{file} exists; choose another file with --out, or overwrite it with --force")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: the folder {file.parent} does not exist; create it, or choose another file")
    place = path if is_uri(path) else os.path.abspath(os.path.expanduser(path))
    if not is_uri(place) and (Path(place) / "run.json").is_file() and (Path(place) / "stages").is_dir():
        raise UserError(f"{place} is a run folder, not data; `distill-at-scale show {path}` says what it holds")
    with display.status("looking at the data"):
        inspection = inspect(place, source, seed)
    for line in inspection.lines():
        display.say(line)
    look = inspection.look
    if look.count and len(look.broken) == look.count:
        sample, reason = look.broken[0]
        raise UserError(f"none of {look.count} samples can be used, for example {sample}: {reason}")
    from distill_at_scale.pipeline.planning import starter_config, starter_file  # torch

    with display.status("measuring this machine") as show:
        starter = starter_config.choose(inspection, method, ipc, seconds, name, file.parent, show)
    with publish(file) as temporary:
        temporary.write_text(starter_file.render(starter, path, budget), encoding="utf-8")
    for line in starter_file.summary(starter, file):
        display.say(line)
    return file


def _file_name(text: str) -> str:
    """The last part of a path, URI, pattern or object's name, as part of a file name."""
    name = last_name(text.rstrip("/")) if "/" in text else text
    name = os.path.basename(os.path.abspath(name)) if name == "." else name
    name = re.sub(r"\{.*|\.(parquet|tar|tgz|tar\.gz)$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "data"


def parse_budget(text: str) -> float:
    """Seconds of `10min`, `90s`, `1.5h` or `1h30min`. Raises UserError for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(sec|min|[smhd])", text.strip().lower())
    if not parts or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text.lower()):
        raise UserError(f"--budget {text}: write a time such as 10min, 90s or 2h")
    seconds = sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts)
    if seconds < 10:
        raise UserError(f"--budget {text}: a run takes at least 10 s; give more")
    return seconds


def check_method(method: str, ipc: int) -> None:
    """Raises UserError for a method that does not exist, and for ipc < 1."""
    if ":" not in method and method not in known_methods():
        raise UserError(f"--method {method}: the method is unknown; {suggest(method, known_methods())}")
    if ipc < 1:
        raise UserError(f"--ipc {ipc}: give 1 or more synthetic samples per class")


def known_methods() -> list[str]:
    """The built-in methods: each has a section of its name in `distill`."""
    types = {name: field.annotation for name, field in DistillSection.model_fields.items()}
    return [name for name, one in types.items() if isinstance(one, type) and issubclass(one, Section)]
