"""The one exception that a user is meant to read: what is wrong, where, and what to do next."""


class UserError(ValueError):
    """Bad input or an impossible request; the command prints the message without a traceback and exits with 2."""


class DistillationDiverged(UserError):
    """A loss became NaN or infinite; the last good state is kept on disk."""
