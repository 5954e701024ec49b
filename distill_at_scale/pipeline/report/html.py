"""The template engine that the pages of runs, sweeps and studies share, and settings as text.

Every page is one file that opens offline. Names from users are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.pipeline.report.style import COLORS
from distill_at_scale.pipeline.report.text import accuracy, duration, shape, share
from distill_at_scale.storage.redact import public


def write(path: Path, template: str, contents: Mapping[str, Any]) -> Path:
    """Render a template of this package to a file atomically; returns its path."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pages.filters |= {"accuracy": accuracy, "share": share, "shape": shape, "duration": duration}
    pages.filters["comma"] = "{:,}".format
    text = pages.get_template(template).render(colors=COLORS, **contents)
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return path


def as_yaml(values: Mapping[str, Any]) -> str:
    """Settings as YAML, without credentials in URIs."""
    return yaml.safe_dump(public(values), sort_keys=False, allow_unicode=True, width=100)
