"""The two ways a command can fail, told apart by the command line."""


class RequestError(Exception):
    """The request is wrong: one line that says what and how to mend it. Exit code 2."""


class RunError(Exception):
    """The request was right, but the work failed on the way. Exit code 1."""
