"""The configuration of a small sweep."""

from __future__ import annotations

from pathlib import Path

from conftest import tiny_config

from distill_at_scale.config.load import Config

RATES = {"select.keep": [0.1, 0.3]}


def config(folder: Path | str = "nowhere", **sweep) -> Config:
    sections = {key: sweep.pop(key) for key in list(sweep) if "__" in key}
    return tiny_config(folder, sweep={"space": RATES, **sweep}, **{"runtime__rule": "none", **sections})
