"""The classes to use and their order: the field's ImageNet subsets by name, lists in text files, explicit orders.

The 10-class subsets have the order of the distillation literature (MTT, Cazenavette et al. 2022); ImageNette has the same order
in its own release. ImageNet-100 is the list of CMC (Tian et al. 2020), sorted as its class folders are. Other lists of 100
classes have the same name; give those as a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distill_at_scale.config.explain import suggest
from distill_at_scale.core.errors import UserError

SUBSETS = {  # WordNet ids
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257",
    "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 n02105641",
    "imagemeow": "n02123045 n02123159 n02123394 n02123597 n02124075 n02129165 n02129604 n02128925 n02128757 n02127052",
    "imagesquawk": "n01806143 n02007558 n01818515 n02051845 n02056570 n01614925 n01843383 n01518878 n01860187 n01819313",
    "imagefruit": "n07753275 n07753592 n07745940 n07747607 n07749582 n07768694 n07753113 n07720875 n07718472 n07742313",
    "imageyellow": "n02206856 n12057211 n07753592 n07749582 n12144580 n04146614 n03530642 n02129165 n01773157 n01531178",
    "imagenet100": (
        "n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166 n01983481 "
        "n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622 n02091831 n02093428 "
        "n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047 n02113799 n02113978 n02114855 "
        "n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291 "
        "n02701002 n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245 n03085013 "
        "n03259280 n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 "
        "n03775546 n03777754 n03785016 n03787032 n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 "
        "n04067472 n04099969 n04111531 n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 "
        "n04485082 n04493381 n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 "
        "n13040303"
    ),
}


def class_list(value: Sequence[str] | str) -> list[str]:
    """The classes that data.classes names: a list as it is, the name of a known subset, or a file with a class per line.

    Raises UserError for a string that is neither, and for a file that is empty or repeats a class.
    """
    if not isinstance(value, str):
        return list(value)
    if (subset := value.lower().replace("-", "").replace("_", "")) in SUBSETS:
        return SUBSETS[subset].split()
    if not Path(value).expanduser().is_file():
        problem = f"data.classes = {value!r} is neither a known subset ({suggest(value, SUBSETS)}) nor a text file"
        raise UserError(f"{problem} with one class per line; write a single class as a list, [name]")
    return _read_names(value, "data.classes")


def explicit_order(source_names: Sequence[str], path: str) -> tuple[list[str], list[int]]:
    """Reads data.class_names: the class names in the order of a text file, and the new label of each old label.

    If the source only numbers its classes ("0".."n-1"), the file names them and no label changes. Otherwise it must hold
    exactly the source's names, and labels follow its order. Raises UserError naming the first missing or extra class.
    """
    names, known = _read_names(path, "data.class_names"), list(source_names)
    if known == [str(number) for number in range(len(known))] and set(names) != set(known):
        if (count := len(known)) != len(names):
            problem = f"names {len(names)} classes, the data set has {count}, numbered 0..{count - 1}"
            hint = "write one line for each, in the order of the numbers"
            raise UserError(f"data.class_names = {path!r} {problem}; {hint}")
        return names, list(range(len(names)))
    faults = ((known, set(names), "lacks the class"), (names, set(known), "names an unknown class:"))
    for expected, present, fault in faults:
        if (odd := next((name for name in expected if name not in present), None)) is not None:
            hint = f"it must hold every class of the data set ({len(known)}) once, in the order of the labels"
            raise UserError(f"data.class_names = {path!r} {fault} {odd!r}; {hint}")
    label_of = {name: label for label, name in enumerate(names)}
    return names, [label_of[name] for name in known]


def _read_names(path: str, key: str) -> list[str]:
    """The lines of a text file; a # after a space or at the start of a line begins a comment."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{key} = {path!r} cannot be read: {error.strerror}; give a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"{key} = {path!r} is not a text file in UTF-8; write one class per line") from None
    names = [name for line in text.splitlines() if (name := f" {line}".split(" #")[0].strip())]
    if not names:
        raise UserError(f"{key} = {path!r} names no class; write one class per line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{key} = {path!r} names the class {repeated[0]!r} twice; each may occur once")
    return names
