"""YAML that the schema reads: a plain scalar for a text key is text, whatever YAML makes of it.

YAML reads `1e3` as a number and `no` as false. A key of type text, and every entry of a list of text, takes the characters
instead. `null`, `~` and nothing stay null.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import BaseModel

from distill_at_scale.config.keys import annotation_of, entry_of_list, is_text, members, section_of, value_of_mapping

MAX_VALUES = 20_000  # of a configuration file, with its aliases expanded
TEXT = "tag:yaml.org,2002:str"
LOOK_ALIKES = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "value", "merge"))


def read(text: str, root: type[BaseModel], annotation: Any) -> Any:
    """The plain value of a YAML text.

    Args:
        root: the schema; a mapping of any values may hold its dotted keys (sweep.space).
        annotation: the type of the value; for a whole file the schema.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text cannot be read, or expands to more than MAX_VALUES values.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_typed(node, root, annotation))
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def read_override(text: str, root: type[BaseModel], annotation: Any) -> Any:
    """The value of an override `key=text`.

    A text key takes the text as it is; one pair of quotes around the whole text is removed. Nothing is null, and so is
    `null` where null is allowed. A text that starts like a list or a mapping is YAML where the key takes one; so is every
    value of another type. Raises what `read` raises.
    """
    form = {"[": entry_of_list, "{": value_of_mapping}.get(text.lstrip()[:1])
    if not is_text(annotation) or (form and form(annotation) is not None):
        return read(text, root, annotation)
    if not text or (text == "null" and type(None) in members(annotation)):
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
    return text[1:-1] if quoted else text


def _typed(node: Any, root: type[BaseModel], annotation: Any) -> Any:
    """A copy of a node in which plain scalars of text keys are text; an alias may stand for keys of different types."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag not in LOOK_ALIKES or annotation is None or not is_text(annotation):
            return node
        return yaml.ScalarNode(TEXT, node.value, node.start_mark, node.end_mark, node.style)
    if isinstance(node, yaml.SequenceNode):
        entry = entry_of_list(annotation)
        entries = [_typed(child, root, entry) for child in node.value]
        return yaml.SequenceNode(node.tag, entries, node.start_mark, node.end_mark)
    if section_of(annotation) is None and value_of_mapping(annotation) is None:
        return node
    pairs = []
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            return node  # a list or a mapping as a key: no schema has that
        plain = key.tag in (*LOOK_ALIKES, "tag:yaml.org,2002:null")
        name = yaml.ScalarNode(TEXT, key.value, key.start_mark, key.end_mark) if plain else key
        pairs.append((name, _typed(value, root, _below(root, annotation, key.value))))
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _below(root: type[BaseModel], annotation: Any, name: str) -> Any:
    """The type of the value at a name of a section or a mapping; None if it is unknown or any."""
    if section := section_of(annotation):
        return annotation_of(section, name) if "." not in name else None
    if (value := value_of_mapping(annotation)) is not Any:
        return value
    key = annotation_of(root, name) if "." in name else None  # sweep.space and studies.across.sets hold dotted keys
    return None if key is None else key | list.__class_getitem__(key)  # the space holds lists of values


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of YAML 1.2 and without dates: 1e-3 is a number; 12:30 and 2024-01-01 are text. It refuses
    repeated keys and aliases that expand to too many values.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)",
    "float": r"[-+]?(\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in (*NUMBERS, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for kind, pattern in NUMBERS.items():  # the first that matches decides
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^({pattern})$"), list("-+0123456789."))


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """The number of values below a node with all aliases expanded.

    Raises YAMLError for more than MAX_VALUES, and for an alias inside the node that it names.
    """
    if id(node) not in counts:
        counts[id(node)] = MAX_VALUES + 1  # while counting: an alias inside itself never ends
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in flat)
    if counts[id(node)] > MAX_VALUES:
        raise yaml.YAMLError(f"it holds more than {MAX_VALUES:,} values with its aliases expanded")
    return counts[id(node)]
