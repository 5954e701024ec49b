"""Reads pickles of plain containers and numeric numpy arrays, and nothing else; a hostile one is refused unrun.

No function that a pickle names is ever called: the few names that CIFAR's files need are answered with stand-ins of our
own, which only take bytes and shapes down. Objects, object arrays and every other global are refused.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np


class Refused(ValueError):
    """The pickle asks for more than plain data."""


def load(content: bytes) -> Any:
    """What a pickle holds; texts of Python 2 are read as Latin-1.

    Raises Refused for anything but plain data, and whatever `pickle` raises for a damaged file.
    """
    return _plain(_Unpickler(io.BytesIO(content), encoding="latin1").load())


class _DType:
    """Stands in for numpy.dtype: a code such as u1, and a byte order."""

    def __init__(self, code: Any = None, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        code = self.code.decode("latin1") if isinstance(self.code, bytes) else self.code
        if not isinstance(code, str) or len(code) != 2 or code[0] not in "biuf" or code[1] not in "1248":
            raise Refused(f"it holds an array of the type {self.code!r}")
        return np.dtype(("<" if self.order not in ("<", ">") else self.order) + code)


class _Array:
    """Stands in for numpy.ndarray: takes the pickled state down and becomes an array afterwards."""

    def __init__(self, *_: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray[Any, Any]:
        _, shape, kind, fortran, data = self.state
        return _build(data, shape, kind, "F" if fortran else "C")


class _Buffer:
    """Stands in for the function that builds an array from bytes in pickles of protocol 5."""

    def __init__(self, data: Any = None, kind: Any = None, shape: Any = None, order: Any = "C"):
        self.parts = (data, shape, kind, order)

    def array(self) -> np.ndarray[Any, Any]:
        return _build(*self.parts)


def _build(data: Any, shape: Any, kind: Any, order: Any) -> np.ndarray[Any, Any]:
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, _DType) or not isinstance(raw, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise Refused("it holds an array that is not made of plain bytes")
    dtype = kind.dtype()
    if math.prod(shape) * dtype.itemsize != len(raw) or order not in ("C", "F"):
        raise Refused(f"it holds an array of shape {shape} with {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _new_array(*_: Any) -> _Array:
    return _Array()


def _encoded(text: Any = "", encoding: Any = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise Refused(f"it holds a text in the encoding {encoding!r}")
    return text.encode("latin1")


STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encoded,  # how Python 3 writes bytes for protocol 2
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise Refused(f"it asks for {module}.{name}")
        return STAND_INS[module, name]


def _plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """The value with stand-ins replaced by arrays; raises Refused for what is no plain data.

    What is held in several places is replaced once, so that a small file cannot grow without end.
    """
    done = {} if done is None else done
    if id(value) not in done:
        done[id(value)] = _replaced(value, done)
    return done[id(value)]


def _replaced(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, (_Array, _Buffer)):
        return value.array()
    if isinstance(value, dict):
        return {_plain(key, done): _plain(item, done) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, done) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray)):
        return value
    raise Refused(f"it holds a {type(value).__name__}")
