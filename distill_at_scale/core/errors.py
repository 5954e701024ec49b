"""Errors that a user reads: what is wrong, where, and what to do next."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input or an impossible request; the command prints the message without a traceback and exits with 2."""


class Unreachable(UserError):
    """The source cannot be reached or read now: no such folder or bucket, no permission, or no network."""


class WorkersLost(UserError):
    """Processes of a cluster were lost more often than `cluster.max_failures` allows."""


class OtherConfiguration(UserError):
    """A run folder holds a stage's output of another configuration; `difference` has a line per key that differs."""

    def __init__(self, message: str, difference: Sequence[str]):
        super().__init__(message)
        self.difference = difference

    def __reduce__(self) -> tuple[type, tuple[str, Sequence[str]]]:
        return type(self), (str(self), self.difference)


class Damaged(UserError):
    """A stage's record or output in a run folder is not what was written."""

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason, self.advice = reason, advice

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.advice)


class Busy(UserError):
    """Another command holds the lock of the run folder."""


class RunWarning(UserWarning):
    """A warning that the command prints as one line; it hides the warnings of libraries."""


def is_transient(error: BaseException) -> bool:
    """Whether the cause is a machine, a disk or storage, so that the same work may succeed later."""
    return isinstance(error, OSError | Unreachable | WorkersLost | Busy)


class TrialStopped(BaseException):
    """A scheduler stopped a trial early. Not an Exception, because it is not a failure."""


class DistillationDiverged(UserError):
    """A loss became NaN or infinite; the last finite state is on disk. `visit` orders such errors within one step."""

    def __init__(self, message: str, visit: int = 0):
        super().__init__(message)
        self.visit = visit

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.visit)
