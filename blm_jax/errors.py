"""The ways a command can end early, told apart by the command line."""


class RequestError(Exception):
    """The request is wrong: one line that says what and how to mend it. Exit code 2."""


class RunError(Exception):
    """The request was right, but the work failed on the way. Exit code 1."""


class StoppedError(Exception):
    """Asked to stop by a signal, and all is saved: the same command goes on. Exit code 143, as for any process that SIGTERM ends."""
