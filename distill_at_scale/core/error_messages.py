"""What a command prints of errors and warnings, and the exit status that follows. Imports rich when it prints."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from distill_at_scale.core.errors import RunWarning, UserError

FULL, DENIED = "Free space or choose another place", "Check its permissions or choose another place"
ADVICE = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EACCES: DENIED, errno.EROFS: DENIED, errno.EPERM: DENIED}
OTHER_ADVICE = "Check the disk, and that all nodes see it at this path"


def _say_error(text: str) -> None:
    from rich.console import Console

    from distill_at_scale.core.progress import printable

    Console(stderr=True, highlight=False).print(printable(text), markup=False, soft_wrap=True)


@contextmanager
def own_warnings_only() -> Iterator[None]:
    """Print our warnings as one line each; hide those of torch, Ray and other libraries, which a user cannot act on.

    With `python -W` or PYTHONWARNINGS, Python prints all of them in its own way.
    """

    def show(message: Warning | str, category: type[Warning], *rest: object, **options: object) -> None:
        if issubclass(category, RunWarning):
            _say_error(f"warning: {message}")

    if sys.warnoptions:
        yield
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def report_errors(body: Callable[[], int | None]) -> int:
    """Print an error of `body` that the user can fix as one line, and return the exit status."""
    try:
        return body() or 0
    except UserError as error:
        _say_error(f"error: {error}")
    except KeyboardInterrupt:
        _say_error("interrupted; give the same command again to resume")
        return 130
    except OSError as error:
        if error.errno is None:
            raise
        where, advice = error.filename or "the run folder", ADVICE.get(error.errno, OTHER_ADVICE)
        _say_error(f"error: {error.strerror}: {where}. {advice}, and repeat the command; finished work is kept.")
    return 2
