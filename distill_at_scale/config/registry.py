"""Turns a name in a configuration into the object behind it.

A name is a key of one of the package's plain dicts (sources, criteria, backends, networks) or `package.module:Object`
from the user's own code; that is the whole plug-in system.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from distill_at_scale.config.load import suggest
from distill_at_scale.core.errors import UserError


def resolve(key: str, name: str, table: Mapping[str, Any], needs: tuple[str, ...] = ()) -> Any:
    """The object called `name`; `key` is the configuration key for messages, `needs` the attributes of the contract.

    Raises UserError for an unknown name, a module that does not import, or an object that misses part of the contract.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise UserError(f"{key} = {name!r} is unknown; {suggest(name, table)} (or package.module:Object)")
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} = {name!r} cannot be imported: {error}") from None
    if missing := [need for need in needs if not hasattr(found, need)]:
        raise UserError(f"{key} = {name!r} does not keep the contract: it lacks {', '.join(missing)}")
    return found
