"""Reads pickles of plain containers and numeric numpy arrays, such as CIFAR's; refuses everything else without running it.

`pickle.Unpickler` runs with an allow-list. An allowed name is not called either: the call is recorded and the arrays are
built from the recorded bytes, type and shape. numpy's own functions trust their arguments too much: a pickle of 33 bytes
that calls `numpy.ndarray` fills gigabytes, and `numpy.dtype.__setstate__` accepts wrong item sizes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

MAX_SIZE, MAX_OPCODES = 2**28, 2**21  # CIFAR-100's training file has 155 MB and about 200,000 opcodes
MEMO_WRITES = ("PUT", "BINPUT", "LONG_BINPUT")
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how Python 3 writes bytes for protocol 2
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),  # protocol 5
}


class UnsafePickle(ValueError):
    """The pickle holds something other than plain data."""


def load(content: bytes) -> Any:
    """Returns what a pickle holds; text of Python 2 is decoded as Latin-1.

    Raises UnsafePickle for anything but plain data, and whatever `pickle` raises for a damaged file.
    """
    if len(content) > MAX_SIZE:
        raise UnsafePickle(f"it has more than {MAX_SIZE:,} bytes")
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count >= MAX_OPCODES:
            raise UnsafePickle(f"it has more than {MAX_OPCODES:,} opcodes")
        # pickle allocates 16 bytes for each index up to the largest one, used or not
        if opcode.name in MEMO_WRITES and argument is not None and argument > len(content):
            raise UnsafePickle(f"it numbers an object {argument:,} in a file of {len(content):,} bytes")
    return _build(_Unpickler(io.BytesIO(content), encoding="latin1").load(), {})


class _Call:
    """A recorded call: the function's name, its arguments, and the state that the pickle sets on the result."""

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.name, self.args = name, args
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UnsafePickle(f"it asks for {module}.{name}")
        return lambda *args: _Call(name, args)  # new each time: a pickle cannot change it for the next

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickle(f"it refers to an object outside the file, {pid!r}")


def _build(value: Any, done: dict[int, Any]) -> Any:
    """The value with recorded calls replaced by their results.

    `done` maps the id of a value to its result: a value held in many places is built once, so the result cannot outgrow
    the file. Raises UnsafePickle for a value that is not plain data.
    """
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, _Call) and value.name == "encode":
        text, encoding = value.args
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise UnsafePickle(f"it holds text in the encoding {encoding!r}")
        result = text.encode("latin1")
    elif isinstance(value, _Call):
        result = _array(value, done)
    elif isinstance(value, dict):
        result = {_build(key, done): _build(item, done) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(_build(item, done) for item in value)
    elif value is not None and not isinstance(value, (bool, int, float, str, bytes, bytearray)):
        raise UnsafePickle(f"it holds a {type(value).__name__}")
    done[id(value)] = result
    return result


def _array(call: _Call, done: dict[int, Any]) -> np.ndarray[Any, Any]:
    shape: Any
    order: Any
    if call.name == "_reconstruct":
        shape, kind, is_fortran, data = call.state[1:] or (None, None, False, None)
        order = "F" if is_fortran else "C"
    elif call.name == "_frombuffer":
        data, kind, shape, order = call.args
    else:
        raise UnsafePickle(f"it holds a numpy.{call.name}")
    if isinstance(data, _Call):
        data = _build(data, done)
    data = data.encode("latin1") if isinstance(data, str) else data
    if not (isinstance(kind, _Call) and kind.name == "dtype" and kind.args) or not isinstance(data, (bytes, bytearray)):
        raise UnsafePickle("it holds an array that is not made of plain bytes")
    code = kind.args[0].decode("latin1") if isinstance(kind.args[0], bytes) else kind.args[0]
    if not isinstance(code, str) or len(code) != 2 or code[0] not in "biuf" or code[1] not in "1248":
        raise UnsafePickle(f"it holds an array of type {code!r}")
    byte_order = kind.state[1] if kind.state else "="
    dtype = np.dtype((byte_order if byte_order in ("<", ">") else "<") + code)
    sizes_are_plain = isinstance(shape, tuple) and all(type(size) is int for size in shape)
    if not sizes_are_plain or math.prod(shape) * dtype.itemsize != len(data) or order not in ("C", "F"):
        raise UnsafePickle(f"it holds an array of shape {shape!r:.100} with {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order=order)
