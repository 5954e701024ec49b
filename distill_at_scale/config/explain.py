"""Problems of a configuration in one sentence each: the key, where it was set, what is allowed, and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from distill_at_scale.config.keys import annotation_of, choices, section_of, sections, words
from distill_at_scale.config.sections import MAX_LR

MAX_SHOWN = 100  # characters of a wrong value
MAX_PROBLEMS = 20  # lines of one message
MAX_NEAREST = 3  # names that an error suggests


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """Up to three known names that a wrong name may mean, best first: those that hold it or that it holds, then similar
    ones.
    """
    known, lower = sorted(known), name.lower()
    whole = [other for other in known if len(lower) > 2 and (lower in other.lower() or other.lower() in lower)]
    whole = [other for other in whole if len(other) > 2]
    similar = difflib.get_close_matches(lower, known, n=1, cutoff=cutoff)
    return list(dict.fromkeys([*similar, *sorted(whole, key=len)]))[:MAX_NEAREST]


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the closest known names, or the list of known names."""
    known = sorted(known)
    close = nearest(name, known)
    return f"did you mean {' or '.join(close)}?" if close else "known: " + ", ".join(known)


def keys_named(model: type[BaseModel], last: str, cutoff: float = 1.0) -> list[str]:
    """The dotted keys that end with a name, in the outermost sections that have such a key.

    Args:
        cutoff: below 1 the nearest name of a key serves, too, if no key has the name.
    """
    names: dict[str, list[str]] = {}
    for key in (key.name for group in sections(model) for key in group.keys):
        names.setdefault(key.rpartition(".")[2], []).append(key)
    if last not in names and cutoff < 1:
        last = next(iter(difflib.get_close_matches(last, names, n=1, cutoff=cutoff)), "")
    return [key for key in names.get(last, ()) if key.count(".") == min(other.count(".") for other in names[last])]


def unknown_key(model: type[BaseModel], name: str) -> tuple[str, str]:
    """What is wrong with a dotted key that the schema lacks, and which keys may be meant."""
    top, rest = name.partition(".")[0], name
    if top not in model.model_fields:
        what, known = f"unknown section {top or 'without a name'}", f"sections: {', '.join(model.model_fields)}"
        meant = keys_named(model, name, cutoff=0.7)
        meant = meant or [name.replace(top, section, 1) for section in nearest(top, model.model_fields, 0.6)[:1]]
        meant = [key if annotation_of(model, key) else key.partition(".")[0] for key in meant]
    else:
        section, parent = model, ""
        while inner := section_of(annotation_of(model, f"{parent}{rest.partition('.')[0]}")):
            section, parent, rest = inner, f"{parent}{rest.partition('.')[0]}.", rest.partition(".")[2]
        what, known = f"unknown key {name}", f"keys of {parent[:-1]}: {', '.join(section.model_fields)}"
        same = keys_named(model, rest)
        meant = [f"{parent}{key}" for key in nearest(rest, section.model_fields, 0.75 if same else 0.5)[:1]] + same
    meant = list(dict.fromkeys(meant))[:MAX_NEAREST]
    return what, f"did you mean {' or '.join(meant)}? {known[0].upper()}{known[1:]}" if meant else known


def problems(
    model: type[BaseModel],
    errors: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    origin: Mapping[str, str],
    file: str,
) -> list[str]:
    """One sentence per key for pydantic's errors, which has one for each member of a union.

    Args:
        values: the nested plain values that were refused.
        origin: where a dotted key was set, if not in the file.
    """
    lines: dict[str, str] = {}
    for error in errors:
        key, value = _key_and_value(model, error, values)
        related = (name for name in origin if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}."))
        where = origin.get(next(related, ""), file) if key else file
        annotation = annotation_of(model, key) if key else model
        own = error["msg"].removeprefix("Value error, ") if error["type"] == "value_error" else ""
        if error["type"] == "extra_forbidden":
            what, advice = unknown_key(model, key)
            lines[key] = f"{what} (in {where}); {advice}"
        elif own and section_of(annotation):
            lines[key] = f"{key} (in {where}): {own}" if key else f"{where}: {own}"
        elif own or key not in lines:
            shown = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
            shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]} ..."
            allowed = own or _allowed(annotation, error, value)
            lines[key] = f"{key or 'the content'} = {shown} (in {where}) is not allowed: {allowed}"
    first, left = list(lines.values())[:MAX_PROBLEMS], len(lines) - MAX_PROBLEMS
    return [*first, f"and {left:,} more problems"] if left > 0 else first


def _key_and_value(model: type[BaseModel], error: Mapping[str, Any], value: Any) -> tuple[str, Any]:
    """The dotted key of an error, without list positions and members of unions; and its value."""
    names: list[str] = []
    for part in error["loc"]:
        name = ".".join([*names, str(part)])
        if annotation_of(model, name) is None and error["type"] != "extra_forbidden":
            continue  # the member of a union that was tried, for example MlflowSection
        if isinstance(value, Mapping) and part in value:
            names, value = [*names, str(part)], value[part]
        if section_of(annotation_of(model, name)) is None:
            break
    return ".".join(names), value


def _allowed(annotation: Any, error: Mapping[str, Any], value: Any) -> str:
    """What the value should be."""
    if section := section_of(annotation):
        return f"it should be a section with keys, such as {next(iter(section.model_fields))}"
    text = f"it should be {words(annotation, sentence=True)}"
    if error["type"] == "finite_number":
        text = text.replace("number", "finite number")
    if error["type"] == "less_than_equal" and error["ctx"]["le"] == MAX_LR:
        text += f" and at most {MAX_LR:g}"
    near = nearest(value, choices(annotation))[:1] if isinstance(value, str) else []
    return f"{text}; did you mean {near[0]}?" if near else text
