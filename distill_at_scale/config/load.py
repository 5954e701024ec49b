"""One strict schema for a whole run: defaults <- YAML file <- dotted overrides.

Every key has a type and a range. An unknown key or a wrong value stops the run before anything is computed, and the error
says what is allowed. Names of interchangeable parts (source, criterion, method, network) are plain strings here;
`registry.py` resolves them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from distill_at_scale.config import explain, infrastructure, sections, shipped, typed_yaml
from distill_at_scale.config.experiments import CompareSection, StudiesSection, SweepSection
from distill_at_scale.config.fields import Section, execution_key
from distill_at_scale.config.keys import annotation_of, section_of
from distill_at_scale.config.methods import DistillSection, EvaluateSection, RuntimeSection
from distill_at_scale.core.errors import UserError

MAX_CHARACTERS = 2**20  # of a configuration file
MANY_IMAGES = 5  # per class; from here on the samples of lowest loss are too similar
REMOVED = {"tolerance", "lowest", "points"}  # keys of select.auto in run.json of earlier versions, without effect


class Config(Section):
    """All sections of a run, and the checks that span several of them."""

    run: infrastructure.RunSection = infrastructure.RunSection()
    data: sections.DataSection = sections.DataSection()
    score: sections.ScoreSection = sections.ScoreSection()
    select: sections.SelectSection = sections.SelectSection()
    distill: DistillSection = DistillSection()
    runtime: RuntimeSection = RuntimeSection()
    evaluate: EvaluateSection = EvaluateSection()
    cluster: infrastructure.ClusterSection = execution_key(infrastructure.ClusterSection())
    track: infrastructure.TrackSection = execution_key(infrastructure.TrackSection())
    sweep: SweepSection = execution_key(SweepSection())
    studies: StudiesSection = execution_key(StudiesSection())
    compare: CompareSection = execution_key(CompareSection())

    @model_validator(mode="after")
    def _select_fits(self) -> Config:
        select = self.select
        if select.keep == "auto":
            if select.per_class:
                raise ValueError(
                    "select.keep: auto searches for a selection, but select.per_class is one; give one of them"
                )
            if select.order == "stratum":
                raise ValueError(
                    "select.keep: auto tries several keep rates, which do not fit select.order: stratum; name strata in "
                    "select.auto.portfolio"
                )
        elif select.order == "stratum" and not select.per_class and select.stratum_start + select.keep > 1 + 1e-9:
            raise ValueError(
                f"select.stratum_start + select.keep is {select.stratum_start + select.keep:g}; "
                "a stratum must end at or before 1"
            )
        if select.scope == "global" and select.order in sections.DRAWN:
            raise ValueError(
                f"select.scope: global ranks all samples together, but select.order: {select.order} orders each class by "
                "itself; set select.scope to class or adaptive"
            )
        return self

    @model_validator(mode="after")
    def _score_for_selection(self) -> Config:
        """score.criterion gets `clusters` if select.order needs it; with select.keep: auto, all that the candidates need."""
        candidates: list[dict[str, Any]] = [{"order": self.select.order}]
        named = list[str]()
        if self.select.keep == "auto":
            candidates = self.select.auto.portfolio or self.selections
        for candidate in candidates:
            criterion = candidate.get("criterion") or []
            named += [criterion] if isinstance(criterion, str) else criterion
            named += ["clusters"] if candidate.get("order") == "clusters" else []
        elsewhere = {"random", *self.score.criteria, *self.score.imported}
        missing = [name for name in dict.fromkeys(named) if name not in elsewhere]
        if not missing:
            return self
        score = self.score.model_copy(update={"criterion": [*self.score.criteria, *missing]})
        return self.model_copy(update={"score": score})

    @model_validator(mode="after")
    def _there_is_a_held_out_part(self) -> Config:
        if self.evaluate.split == "held_out" and not self.select.held_out:
            raise ValueError("evaluate.split: held_out needs a held-out part; set select.held_out, for example to 0.2")
        return self

    @property
    def selections(self) -> list[dict[str, Any]]:
        """Criterion and order of each selection that select.keep: auto tries by default, the most promising first.

        A criterion or an order in `select` limits them to it. For few images per class the samples of lowest loss are best,
        for more of them the samples have to cover the class (`jobs/benchmarks/README.md`).
        """
        select, first, random = self.select, self.score.criteria[0], {"criterion": "random"}
        if select.criterion is not None or select.order != "useful":
            return [{"criterion": select.criterion, "order": select.order}]
        if first == "random":
            return [random]
        plain, covering = {"criterion": first}, list[dict[str, Any]]()
        if select.scope != "global":  # it ranks all samples together, so no class can be covered
            proxies = first not in ("monte_carlo", *self.score.imported)
            covering = [{**plain, "order": order} for order in ("clusters", "easy_random")[0 if proxies else 1 :]]
        if self.distill.ipc < MANY_IMAGES or not covering:
            return [plain, *covering[:1], random]
        return [*covering, random]

    @property
    def criterion(self) -> str | dict[str, float]:
        """The criterion of the selection, or several with the weights of their ranks."""
        return self.score.criteria[0] if self.select.criterion is None else self.select.criterion

    @property
    def select_seed(self) -> int:
        return self.run.seed if self.select.seed is None else self.select.seed

    @property
    def distill_seed(self) -> int:
        return self.run.seed if self.distill.seed is None else self.distill.seed

    @property
    def min_per_class(self) -> int:
        return max(1, self.distill.ipc) if self.select.min_per_class is None else self.select.min_per_class


def load(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
) -> Config:
    """Read a configuration, apply `section.key=value` overrides and then `keys`, and validate.

    Args:
        source: a YAML file, the name of a shipped configuration, a run folder (run.json has its configuration), a
            configuration, or the values themselves, in the form of `keys`.
        keys: values by section, `{"select": {"keep": 0.1}}`, or by dotted key, `{"select.keep": 0.1}`.

    Raises:
        UserError: names the key, where it was set, and what is allowed.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if isinstance(source, Config):
        values, file = source.model_dump(exclude_unset=True), "the configuration"
    elif isinstance(source, Mapping):
        file = "the values"
        _set_all(values, source)
    elif not isinstance(source, str | Path):
        raise UserError(f"{type(source).__name__} cannot be a configuration; give a path, a name or a dict")
    else:
        if not str(source) or "\0" in str(source):
            raise UserError(
                f"CONFIG is {str(source)!r}; give a YAML file, the name of a shipped configuration or a run folder"
            )
        if "://" in str(source):
            raise UserError(
                "CONFIG is an address, but must be on this machine; give a YAML file, or copy the run folder here"
            )
        path = shipped.file_of(source)
        values, file = _of_run(path) if path.is_dir() else _read_yaml(path), str(path)
    for text in _presets_first([overrides] if isinstance(overrides, str) else map(str, overrides)):
        key, sep, value = text.partition("=")
        key = key.strip()
        key = "select.keep" if (key, value.strip()) == ("select", "auto") else key
        if not sep or "." not in key or not all(part.isprintable() and part for part in key.split(".")):
            raise UserError(f"cannot read the override {text!r}; {_override_advice(key, value if sep else None)}")
        annotation = annotation_of(Config, key)
        try:
            parsed = typed_yaml.read_override(value, Config, annotation)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"the value in {text!r} is not valid YAML; check its brackets and quotes") from None
        _set(values, key.split("."), parsed, text)
        origin[key] = "the command line"
    return validate(values, origin | dict.fromkeys(_set_all(values, keys or {}), "the keywords"), file)


def validate(values: dict[str, Any], origin: dict[str, str] | None = None, file: str = "the configuration") -> Config:
    """Build a Config from nested plain values. Raises one UserError for all problems."""
    try:
        return Config.model_validate(_set_out(values))
    except ValidationError as error:
        raise UserError("\n".join(explain.problems(Config, error.errors(), values, origin or {}, file))) from None


def with_overrides(config: Config, overrides: Mapping[str, Any], origin: str = "the overrides") -> Config:
    """A configuration with some dotted keys set to plain values, validated again.

    Raises UserError for an unknown key or a value that is not allowed; the message names `origin`.
    """
    values = config.model_dump(exclude_unset=True)  # the result knows, too, which keys were set
    # the default of data.chunk must not follow a new data.frames
    values["data"] = {"chunk": config.data.chunk, **values.get("data", {})}
    for key in _presets_first(overrides):
        _set(values, key.split("."), overrides[key], f"{key}={overrides[key]}")
    return validate(values, dict.fromkeys(overrides, origin), origin)


def _override_advice(key: str, value: str | None) -> str:
    """What to write instead of an override whose name is not section.key."""
    if section := section_of(annotation_of(Config, key)):
        example = f"{key}.{next(iter(section.model_fields))}"
        return f"{key} is a section; write {key}.key=value, for example {example}={value or '...'}"
    names = [] if value is None else explain.keys_named(Config, key, cutoff=0.7)
    meant = " or ".join(f"{name}={value}" for name in names)
    return f"did you mean {meant}?" if meant else "write section.key=value, for example select.keep=0.1"


def _of_run(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder. Credentials of its paths are not stored.

    It omits run.redo, which belongs to one command, and a run.reuse that no longer exists; the folder holds what was reused.
    """
    try:
        values: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise UserError(f"{folder} is a folder without a run.json; give a YAML file or a run folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'run.json'} is damaged ({error}); give the YAML file of the run") from None
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # of a damaged file, which is refused below
        values["select"]["auto"] = {k: v for k, v in values["select"]["auto"].items() if k not in REMOVED}
    try:
        config = validate(values, {}, str(folder / "run.json"))
    except UserError as error:
        raise UserError(f"{error}\n{folder} may be of another version of distill_at_scale; use that one") from None
    values = config.model_dump(exclude_defaults=True)  # it holds all keys, but only the others were set
    run = values.get("run", {})
    run.pop("redo", None)
    if "://" not in (reuse := run.get("reuse", "")) and not Path(reuse).exists():
        run.pop("reuse", None)
    # the default of data.chunk follows data.frames
    _set_all(values, {"data.chunk": config.data.chunk, "run.dir": str(folder)})
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        hint = shipped.advice(path) if isinstance(error, FileNotFoundError) else "Is the path right?"
        raise UserError(f"cannot read the configuration {path}: {error.strerror}. {hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a configuration is a YAML file in UTF-8") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{path} has more than {MAX_CHARACTERS:,} characters: no configuration; check the path")
    try:
        values = typed_yaml.read(text, Config, Config)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date or number
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} must hold sections (run, data, score, ...), not a {type(values).__name__}")
    return {key: {} if value is None else value for key, value in _set_out(values or {}).items()}


def _set_all(values: dict[str, Any], keys: Mapping[str, Any], above: str = "") -> list[str]:
    """Set keys given by section or by dotted name; returns the dotted names."""
    names, keys = [], keys if above else _set_out(keys)
    for key in _presets_first(keys):
        value, name = keys[key], f"{above}{key}"
        if isinstance(value, Mapping) and section_of(annotation_of(Config, name)):
            names += _set_all(values, value, f"{name}.")
        else:
            _set(values, name.split("."), _plain(value), f"{name}={value}")
            names.append(name)
    return names


def _set_out(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values by section, with `select: auto` written out."""
    short = isinstance(values, Mapping) and values.get("select") == "auto"
    return {**values, "select": {"keep": "auto"}} if short else values


def _plain(value: Any) -> Any:
    """A value of Python as YAML would hold it: paths are text, tuples are lists, and NumPy's numbers are numbers."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "shape", None) == () else value


def _presets_first(names: Iterable[str]) -> list[str]:
    """Keys, or overrides, in their order, but presets before the keys that win over them."""
    return sorted(names, key=lambda name: name.partition("=")[0].strip() not in ("preset", "score.preset"))


def _set(values: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    if keys == ["score", "preset"] and isinstance(score := values.get("score"), dict):
        # what was set before, in a file, makes way for the preset; what an earlier preset had filled in goes, too
        earlier, preset = (sections.PRESETS.get(str(name), {}) for name in (score.get("preset"), value))
        for key in [k for k in score if k in preset or (k in earlier and score[k] == earlier[k])]:
            del score[key]
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"the override {text!r} goes below {key}, which is not a section")
    values[keys[-1]] = value
