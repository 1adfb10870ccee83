"""What a connector makes of an error of the store that must not reach its engine."""

from __future__ import annotations

from kvstore.outcome import Miss, Reason


def one_line(error: Exception) -> str:
    """The error's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def unavailable(error: Exception) -> Miss:
    """The miss of what was asked for when it was raised."""
    return Miss(Reason.UNAVAILABLE, one_line(error))
