"""The one exception that means "the request is wrong": configuration, arguments, data or environment."""


class UsageError(Exception):
    """One line: what is wrong and what to do about it. Entry points print it and exit with code 2."""


def first_line(error: Exception) -> str:
    """What another library's exception says, as one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
