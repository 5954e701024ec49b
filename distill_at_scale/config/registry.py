"""Resolves a name in a configuration to an object.

A name is a key of one of the package's tables (sources, criteria, methods, networks) or `package.module:Object` from the
user's own code; there is no other plug-in system.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from distill_at_scale.config.load import suggest
from distill_at_scale.core.errors import UserError


def resolve(key: str, name: str, table: Mapping[str, Any], needs: tuple[str, ...] = ()) -> Any:
    """The object called `name`.

    Args:
        key: the configuration key, for messages.
        needs: attributes that the object must have.

    Raises:
        UserError: the name is unknown, its module does not import, or the object lacks an attribute.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise UserError(f"{key} = {name!r} is unknown; {suggest(name, table)} (or package.module:Object)")
    module_name, _, attribute = name.partition(":")
    try:
        resolved = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} = {name!r} cannot be imported: {error}") from None
    if missing := [need for need in needs if not hasattr(resolved, need)]:
        raise UserError(f"{key} = {name!r} does not keep the contract: it lacks {', '.join(missing)}")
    return resolved
