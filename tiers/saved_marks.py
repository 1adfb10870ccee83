"""The ages of a durable tier's chunks, saved beside its catalog so that time goes on while the tier is closed.

A small file of JSON with the marks of `kvstore.tiers.expiry`, their times in unix seconds. It is only ever a hint: what
cannot be read, or was not saved before a crash, lets chunks count as used when the tier was opened.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kvstore.tiers.expiry import TICKS, Mark

_log = logging.getLogger(__name__)

FILE_NAME = "last_uses.json"
FILE_BYTES_MAX = 1 << 16
MARKS_MAX = TICKS + 4
"""A tick each, the running one, and those at both ends."""


def load_marks(directory: Path, clock: Callable[[], float]) -> list[Mark]:
    """The saved marks, in seconds of `clock`; none if there is no file or it is not one of ours."""
    try:
        with (directory / FILE_NAME).open("rb") as file:
            saved = msgspec.json.decode(file.read(FILE_BYTES_MAX), type=list[tuple[float, int]])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _log.warning("%s: chunks count as used now: %s", directory / FILE_NAME, error)
        return []
    offset = clock() - time.time()
    return [(unix_seconds + offset, access) for unix_seconds, access in saved[-MARKS_MAX:]]


def save_marks(directory: Path, marks: Sequence[Mark], clock: Callable[[], float]) -> None:
    """Write the marks in place of those saved before; a failure is logged."""
    offset = time.time() - clock()
    temporary = directory / f"{FILE_NAME}.new"
    try:
        temporary.write_bytes(msgspec.json.encode([(at + offset, access) for at, access in marks]))
        os.replace(temporary, directory / FILE_NAME)
    except OSError as error:
        _log.warning("%s cannot be written: %s", directory / FILE_NAME, error)
