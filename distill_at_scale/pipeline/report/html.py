"""What the pages of runs, sweeps and studies have in common: the template engine, the frame around them, settings as text.

Every page is one file that opens offline; what users named is escaped. Left out: what the pages say and show
(`pipeline/report/run_report.py`, `experiments/sweep/page.py`, `experiments/studies/page.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.pipeline.report import run_plots
from distill_at_scale.pipeline.report import text as wording
from distill_at_scale.storage.filesystem import shown
from distill_at_scale.storage.redact import public


def write(path: Path, template: str, contents: Mapping[str, Any]) -> Path:
    """Render a template of this package to a file, in one step, and return its path."""
    text = engine().get_template(template).render(colors=run_plots.COLORS, **contents)
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return path


def engine() -> jinja2.Environment:
    """Escapes everything and refuses names that it was not given."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    found = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    found.filters |= {f.__name__: f for f in (wording.accuracy, wording.share, wording.shape, wording.duration)}
    found.filters["comma"] = "{:,}".format
    return found


def name_of(path: str | None, source: str) -> str:
    """The data set as the page's title: the last part of its path, never of its credentials, else its source."""
    path = shown(path or "")
    return Path(path.partition("?")[0] if "://" in path else path).name or source


def settings(config: Config) -> str:
    """The configuration as YAML."""
    return as_yaml(config.model_dump())


def as_yaml(values: Mapping[str, Any]) -> str:
    """Settings as YAML; addresses in them lose their credentials."""
    return yaml.safe_dump(public(values), sort_keys=False, allow_unicode=True, width=100)
