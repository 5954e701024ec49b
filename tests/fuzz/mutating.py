"""The harness of the fuzz tests: small real files, broken in many ways, are given to a reader one after the other.

A reader may accept a case or refuse it by the error that it promises. Anything else is a finding: another exception, an
answer that the test's own second opinion does not share, or none within SECONDS. Case i of a kind depends on (kind, i)
alone, and a finding names both and leaves the file in a folder. DISTILL_FUZZ is the number of cases in all; CI runs TOTAL.
Left out: coverage guidance.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

TOTAL = 10_000
CASES = int(os.environ.get("DISTILL_FUZZ", TOTAL))
SECONDS = 60  # for one case, which takes milliseconds
EDGES = (
    0,
    1,
    2,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)

Mutator = Callable[[bytes, random.Random], bytes]


class Hang(BaseException):
    """No answer in time; not an Exception, so that no reader takes it for damage."""


def run(
    kind: str, share: float, seeds: Sequence[bytes], attempt: Callable[[bytes], bool], mutators: Sequence[Mutator]
) -> None:
    """Give `share` of all cases to `attempt`, which returns whether the reader accepted them and raises if something is wrong.

    Some must be accepted and some refused, or the test looks at nothing.
    """
    accepted, count = 0, max(20, round(share * CASES))
    place = Path(tempfile.gettempdir()) / f"fuzz-{kind}-{os.getpid()}"
    for i in range(count):
        case = mutated(random.Random(f"{kind}/{i}"), seeds, mutators)
        place.write_bytes(case)  # before it is tried: it may end this process
        try:
            with in_time():
                accepted += attempt(case)
        except BaseException as error:
            error.add_note(f"case {i} of {kind!r}, saved as {place}")
            raise
    place.unlink()
    assert 0 < accepted < count, f"{accepted} of {count} were accepted"


def mutated(chance: random.Random, seeds: Sequence[bytes], mutators: Sequence[Mutator]) -> bytes:
    """A seed after one to three mutations."""
    case = chance.choice(seeds)
    for _ in range(chance.choice((1, 1, 2, 3))):
        case = chance.choice([*mutators, *BLIND, lambda data, chance: spliced(data, chance.choice(seeds), chance)])(
            case, chance
        )
    return case


@contextmanager
def in_time():
    """Raises Hang after SECONDS; ends the process with all stacks where even that does not get through."""

    def stop(*_):
        raise Hang(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flip(data: bytes, chance: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8)) if flipped else 0):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def edge(data: bytes, chance: random.Random) -> bytes:
    """A number at the edge of its type, somewhere, of some width, in either order of bytes."""
    width, order = chance.choice((1, 2, 4, 8)), chance.choice(("little", "big"))
    at = chance.randrange(max(1, len(data) - width + 1))
    number = chance.choice(EDGES) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, order) + data[at + width :]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def removed(data: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[last:]


def repeated(data: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(data) + 1), chance.choice((1, 4, 16, 64, 512))
    return data[:at] + data[at : at + size] * chance.choice((2, 3, 50)) + data[at + size :]


def zeroed(data: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(data) + 1), chance.choice((4, 16, 512))
    part = data[at : at + size]
    return data[:at] + bytes(len(part)) + data[at + size :]


def inserted(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice((1, 2, 8, 64))) + data[at:]


def spliced(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """The beginning of one and the end of another."""
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def shuffled(parts: list[bytes], chance: random.Random) -> list[bytes]:
    """Parts of a file with one repeated, dropped or moved, or one that is broken inside."""
    if not parts:
        return parts
    at, to = chance.randrange(len(parts)), chance.randrange(len(parts))
    kind = chance.randrange(4)
    if kind == 0:
        return [*parts[:to], parts[at], *parts[to:]]
    if kind == 1:
        return parts[:at] + parts[at + 1 :]
    if kind == 2:
        parts = list(parts)
        parts[at], parts[to] = parts[to], parts[at]
        return parts
    return [*parts[:at], chance.choice(BLIND)(parts[at], chance), *parts[at + 1 :]]


def boxes(data: bytes) -> list[bytes]:
    """The boxes of an mp4, each with its header; what does not fit is one part."""
    parts, at = [], 0
    while at + 8 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        size = size if 8 <= size <= len(data) - at else len(data) - at
        parts.append(data[at : at + size])
        at += size
    return [*parts, data[at:]] if at < len(data) else parts


BLIND: tuple[Mutator, ...] = (flip, flip, edge, edge, cut, removed, repeated, zeroed, inserted)
