"""The command `distill-at-scale COMMAND ...`: one function per sub-command, which parses and calls.

Functions import what they need, so that `--help` and errors of usage load neither torch nor Ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import distill_at_scale as das
from distill_at_scale.cli_work import STAGES, run_stages, work
from distill_at_scale.core import command_line
from distill_at_scale.core.error_messages import own_warnings_only, report_errors
from distill_at_scale.core.terminal import replace_unknown_characters

if TYPE_CHECKING:
    from distill_at_scale.config.load import Config
    from distill_at_scale.core.progress import Display

NAME = command_line.NAME

CONFIG_HELP = "A YAML file, the name of a shipped configuration (`distill-at-scale configs`), or a run folder."
OVERRIDES_HELP = "Keys to set, for example select.keep=0.1; in any place after CONFIG."
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help=OVERRIDES_HELP, show_default=False)
]

app = typer.Typer(
    name=NAME, rich_markup_mode=None, context_settings={"max_content_width": 110, "help_option_names": ["--help", "-h"]}
)


def examples(*lines: str) -> str:
    """The text below a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {NAME} {line}" for line in lines)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{NAME} {das.__version__}")
        raise typer.Exit


@app.callback(
    epilog=f"`{NAME} COMMAND --help` explains a command. An interrupted command resumes when it is given again."
)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prune a data set and distil it into a small synthetic one."""


@app.command(epilog=examples(
    "init --data photos",
    "init --data s3://bucket/photos --budget 1h --out photos.yaml",
    "init --data shards/train-{000..127}.tar --method dc --ipc 10",
))  # fmt: skip
def init(
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="Folder, file, pattern of shards or URI.")],
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Layout, if it is not recognized.")] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="Distillation method.")] = "dm",
    ipc: Annotated[int, typer.Option(metavar="N", help="Synthetic samples per class.")] = 1,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for the first run: 90s, 10min, 2h.")] = "10min",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write; default: named by the data.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> int:
    """Look at your data and write a configuration for it.

    Says which layout the data have, their splits and classes, and what a look at 100 samples shows. Measures this
    machine for some seconds, and chooses settings whose first run fits the budget. The file shows
    published settings and their time in comments.
    """

    def body() -> None:
        from distill_at_scale.core.progress import Display
        from distill_at_scale.pipeline.planning import starter
        from distill_at_scale.storage.filesystem import redact_uri

        display = Display()
        display.say(f"looking at {redact_uri(data)}")
        starter.init(data, display, source=source, method=method, ipc=ipc, budget=budget, out=out, force=force)

    sys.path.append(os.getcwd())  # package.module:Object may name a module in the current folder
    with own_warnings_only():
        return report_errors(body)


@app.command(epilog=examples(
    "run digits",
    "run digits distill.ipc=10 select.keep=0.3 run.dir=runs/ten",
    "run digits cluster.address=none   # in this process, without Ray",
))  # fmt: skip
def run(config: ConfigName, overrides: Overrides = None) -> int:
    """Run all stages in order.

    A stage whose valid output exists is skipped, and an interrupted one resumes. At the end the command prints the
    accuracy of the distilled set and the path of the report.
    """
    return work("run", config, overrides, lambda config, display: run_stages(config, display, STAGES))


def _add_stage(stage: str, summary: str, *lines: str) -> None:
    @app.command(stage, help=summary, epilog=examples(*lines))
    def command(config: ConfigName, overrides: Overrides = None) -> int:
        return work(stage, config, overrides, lambda config, display: run_stages(config, display, (stage,)))


_add_stage(
    "ingest",
    "Decode and resize the data once.\n\nBroken samples are set aside and listed in rejected.parquet.",
    "ingest digits",
    "ingest digits data.size=32 run.dir=runs/large",
)
_add_stage(
    "score",
    "Train proxy networks and score every training sample.\n\nReads the output of ingest.",
    "score digits",
    "score digits score.criterion='[loss,el2n]' run.dir=runs/two run.reuse=runs/digits",
)
_add_stage(
    "select",
    "Rank the samples of each class and keep the useful ones.\n\nReads the output of score.",
    "select digits",
    "select digits select.keep=0.1 run.dir=runs/tenth run.reuse=runs/digits",
)
_add_stage(
    "distill",
    "Distil the kept samples into a synthetic set.\n\nReads the output of ingest and select.",
    "distill digits",
    "distill digits distill.method=dm run.dir=runs/dm run.reuse=runs/digits",
)
_add_stage(
    "evaluate",
    "Train networks on the synthetic set and test them.\n\n"
    "The networks are fresh, and a set of random real samples is tested, too. Reads the output of distill.",
    "evaluate digits",
    "evaluate digits evaluate.seeds=3 run.dir=runs/three run.reuse=runs/digits",
)
_add_stage(
    "report",
    "Write report.html, one page about the run.\n\nReads the output of all stages that have run.",
    "report digits",
    "report digits run.dir=runs/ten",
)


@app.command(epilog=examples("show runs/digits", "show runs/digits --json", "show s3://bucket/runs/digits"))
def show(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run folder: a path or a URI.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> int:
    """Print what a run folder holds, and the next step.

    That is: its configuration, stages, results, warnings and report. The run may be unfinished. Of a sweep or a study it
    prints where the page is.
    """

    def body() -> None:
        from distill_at_scale.core.progress import Display
        from distill_at_scale.pipeline.report import show

        command_line.configured_by(folder if "://" not in folder else "CONFIG", ())
        described = show.describe(folder)
        if json:
            typer.echo(show.as_json(described))
        else:
            show.print_folder(described, Display().console)

    return report_errors(body)


@app.command(epilog=examples("validate digits", "validate imagenette_dm_ipc1 data.path=PATH"))
def validate(
    config: ConfigName,
    overrides: Overrides = None,
    contents: Annotated[
        bool, typer.Option("--contents", help="Also compare every sample with what the run folder ingested.")
    ] = False,
) -> int:
    """Read every sample first, and list the broken ones.

    Checks names, networks and weights, too. Nothing else is computed. The list is validation.parquet in the run
    folder. The exit status is 1 if there are samples that cannot be used.
    """

    def body(config: Config, display: Display) -> int:
        return 1 if das.make_pipeline(config, display).validate(contents) else 0

    return work("validate", config, overrides, body)


@app.command(epilog=examples("plan digits", "plan digits distill.ipc=50 cluster.price=2.0"))
def plan(config: ConfigName, overrides: Overrides = None) -> int:
    """Estimate time, memory, disk and cost of each stage.

    It measures a few steps on this machine, and refuses what cannot fit. After a run it compares the estimates with
    what the run took.
    """
    return work("plan", config, overrides, das.plan_run)


@app.command(epilog=examples("sweep sweep_digits", "sweep sweep_digits sweep.controls=[]"))
def sweep(config: ConfigName, overrides: Overrides = None) -> int:
    """Try many configurations on shared ingest and scores.

    They are the combinations of sweep.space. Random and unpruned controls run, too. Writes sweep.html and
    sweep.parquet.
    """
    return work("sweep", config, overrides, das.run_sweep)


@app.command(epilog=examples("study studies_digits", "study studies_digits studies.run='[drop]'"))
def study(config: ConfigName, overrides: Overrides = None) -> int:
    """Answer questions about pruning on your data.

    The questions of studies.run are answered by many short distillations on shared ingest and scores. Writes
    studies.html, and a file per study in studies/.
    """
    return work("study", config, overrides, das.run_studies)


@app.command(epilog=examples(
    "compare runs/dc runs/dm",
    "compare runs/dc runs/dm compare.labels='[hard,soft]' compare.networks='[convnet,resnet18,vgg11,alexnet]'",
    "compare runs/dc compare.external='{theirs: downloads/set.pt}' compare.seeds=5",
))  # fmt: skip
def compare(
    configs: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [section.key=value]", show_default=False,
                       help="Finished runs (run folders or their configurations) of the same data, and keys to set."),
    ],
) -> int:  # fmt: skip
    """Compare distilled sets with real samples and other sets.

    All are trained with the same recipes. The first run decides data, test split and recipes. The real samples are as many
    images as a set has, or as many as fit into its bytes. Writes compare.html, compare.parquet and compare.json to
    compare/ in the folder of the first run, and its report again.
    """
    runs = [word for word in configs if "=" not in word or Path(word).exists()]
    overrides = [word for word in configs if word not in runs]
    first = runs[0] if runs else configs[0]
    return work("compare", first, overrides, lambda config, display: das.compare_runs(config, runs[1:], display))


@app.command(epilog=examples(
    "export digits --imagefolder out/digits --pt out/digits.pt",
    "export runs/digits --parquet out/digits   # of a run folder, for datasets.load_dataset",
    "export digits --scores scores.csv",
    "export digits --kept kept.csv --kept kept.json run.dir=runs/ten",
))  # fmt: skip
def export(
    config: ConfigName,
    overrides: Overrides = None,
    imagefolder: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="The synthetic set as PNG files in class folders.")
    ] = None,
    videofolder: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Synthetic clips as mp4 files in class folders.")
    ] = None,
    parquet: Annotated[
        list[Path] | None, typer.Option(metavar="DIR|FILE", help="The synthetic set for Hugging Face's datasets.")
    ] = None,
    pt: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="The synthetic set, normalised, for torch.load.")
    ] = None,
    scores: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="The scores of all samples.")] = None,
    kept: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="The list of kept samples.")] = None,
) -> int:
    """Write what a finished run holds to files.

    CONFIG is a YAML file or a run folder. --scores and --kept write *.parquet or *.csv by sample id, or *.json by
    position. Each option may be given several times.
    """

    def body(config: Config, display: Display) -> None:
        from distill_at_scale.pipeline.export import export

        sets = {"imagefolder": imagefolder, "videofolder": videofolder, "parquet": parquet, "pt": pt}
        export(config, scores or [], kept or [], {kind: paths or [] for kind, paths in sets.items()}, display)

    return work("export", config, overrides, body, computes=False)


@app.command(epilog=examples("keys", "keys distill.dm", "keys select.keep", "keys --json > schema.json"))
def keys(
    name: Annotated[str | None, typer.Argument(metavar="[section|key]", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON schema, which editors read.")] = False,
) -> int:
    """Print type, range, default and meaning of keys.

    Without an argument: of all keys.
    """

    def body() -> None:
        from distill_at_scale.config import reference
        from distill_at_scale.core.progress import Display

        console = Display().console
        if json:
            typer.echo(reference.json_text(name))
            return
        for table in reference.tables(name):
            console.print(table)

    return report_errors(body)


configs_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(
    configs_app, name="configs", epilog=examples("configs", "configs cp digits", "configs cp digits mine.yaml")
)


@configs_app.callback()
def configs(context: typer.Context) -> None:
    """List the shipped configurations, or copy one.

    The list has the purpose of each, the data that it needs and its rough cost. `CONFIG` of every command may be a name
    of this list.
    """
    if context.invoked_subcommand is None:
        from distill_at_scale.config import shipped
        from distill_at_scale.core.progress import Display

        Display().console.print(shipped.table())


@configs_app.command("cp", epilog=examples("configs cp digits", "configs cp digits mine.yaml"))
def copy_config(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped configuration.", show_default=False)],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Default: NAME.yaml in the current folder.")
    ] = None,
) -> int:
    """Copy a shipped configuration to a file of your own."""

    def body() -> None:
        from distill_at_scale.config import shipped
        from distill_at_scale.core.progress import Display

        target = shipped.copy(name, file)
        Display().say(f"{target}: a copy of {name}. Next: {shipped.next_command(name, target)}")

    return report_errors(body)


def commands() -> list[str]:
    """The names of all sub-commands."""
    return list(typer.main.get_group(app).commands)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 1 if validate found broken samples; 2 for an error that the user can fix; 130 after Ctrl-C.
    """
    replace_unknown_characters()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # threads that wait for others sleep: spinning slows other processes down. torch's OpenMP reads this once
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with own_warnings_only(), command_line.remembered(*arguments[:1]):
            return app(arguments, prog_name=NAME, standalone_mode=False) or 0
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        named = [word for word in arguments[:1] if word in commands()]
        command = context.command_path if context else " ".join([NAME, *named])
        typer.echo(f"error: {error.format_message()}\nTry `{command} --help`.", err=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
