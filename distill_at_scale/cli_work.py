"""What a sub-command with a configuration does besides its own work: load it, start Ray, watch the cluster, report errors.

Functions import what they need, as in `cli.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import distill_at_scale as das
from distill_at_scale.core import command_line
from distill_at_scale.core.error_messages import report_errors
from distill_at_scale.core.errors import UserError

if TYPE_CHECKING:
    from distill_at_scale.config.load import Config
    from distill_at_scale.core.progress import Display

STAGES = ("ingest", "score", "select", "distill", "evaluate", "report")


def work(
    name: str,
    path: str,
    overrides: Sequence[str] | None,
    body: Callable[[Config, Display], int | None],
    computes: bool = True,
) -> int:
    """Load the configuration, call `body`, and return the exit status; errors that the user can fix become one line.

    A command that `computes` first says what it does, because torch and Ray take seconds to load. Work on a running cluster
    is watched: the loss of its head ends the command with an error.
    """
    sys.path.append(os.getcwd())  # package.module:Object may name a module in the current folder
    command_line.configured_by(path, overrides or ())

    def command() -> int:
        from distill_at_scale.config.load import load
        from distill_at_scale.config.registry import check_built_in
        from distill_at_scale.core.progress import Display

        if "=" in path and not Path(path).exists():
            raise UserError(
                f"CONFIG is missing: {path} is an override; write `{command_line.NAME} {name} CONFIG {path}`"
            )
        config, display = load(path, overrides or ()), Display()
        check_built_in(config)
        if computes:
            display.say(das.opening(config, f"{name} {path}"))
        address = das.ray_address(config)

        def run() -> int:
            stages = STAGES if name == "run" else (name,) if name in STAGES else ()
            with das.started_early(config, display, stages):
                if computes:
                    from distill_at_scale.pipeline import warnings

                    warnings.warn(config, display, overrides or ())
                return body(config, display) or 0

        if not computes or address in (None, "none") or "ray" in sys.modules or not hasattr(os, "fork"):
            return run()
        from distill_at_scale.cluster import head_watchdog

        def connected() -> int:
            with das.explained(config):
                return run()

        return head_watchdog.guarded(address, lambda: report_errors(connected))

    return report_errors(command)


def run_stages(config: Config, display: Display, stages: Sequence[str]) -> None:
    """Run stages, in the order of `STAGES`; print the result if the last one makes it."""
    from distill_at_scale.pipeline.report.show import show_result
    from distill_at_scale.storage.run_dir import RunDir

    das.make_pipeline(config, display).run(stages)
    if stages[-1] in ("evaluate", "report"):
        show_result(RunDir.of(config.run), display.console)
