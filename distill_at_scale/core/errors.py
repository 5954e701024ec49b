"""What a user is meant to read: what is wrong, where, and what to do next."""


class UserError(ValueError):
    """Bad input or an impossible request; the command prints the message without a traceback and exits with 2."""


class Unreachable(UserError):
    """The source cannot be reached or read now: no such folder or bucket, no permission, or no network."""


class WorkersLost(UserError):
    """Processes of a cluster were lost more often than `cluster.max_failures` allows."""


class Busy(UserError):
    """Another command is at work in the folder, or has taken it over."""


def is_transient(error: BaseException) -> bool:
    """Whether an error is one of the machines, disks and storage at work, so that the same work may well succeed later."""
    return isinstance(error, OSError | Unreachable | WorkersLost | Busy)


class TrialStopped(BaseException):
    """A scheduler gave a distillation up, which is no failure: it passes by whatever notes errors."""


class DistillationDiverged(UserError):
    """A loss became NaN or infinite; the last good state is kept on disk. `visit` orders several within one step."""

    def __init__(self, message: str, visit: int = 0):
        super().__init__(message)
        self.visit = visit

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.visit)
