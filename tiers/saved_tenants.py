"""Whose the chunks of a durable tier are, saved beside its catalog, so that quotas go on when it is opened again.

The file: the line `KVTENANTS1`, a line of JSON with the tenants' names, then for each chunk its key and the number of
its tenant's name, u16 little-endian; and the XXH3-64 of all that. A record of a chunk has no room for a tenant, and a
hint is enough: a key that is not there any more is skipped, and a chunk that was stored after the last save before a
crash counts for nobody. Of a file that is damaged nothing is believed.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from kvstore import kernels
from kvstore.keys import KEY_BYTES

_log = logging.getLogger(__name__)

FILE_NAME = "tenants.bin"
MAGIC = b"KVTENANTS1\n"
NAMES_MAX = 1 << 16
_ROW = struct.Struct(f"<{KEY_BYTES}sH")
_CHECK = struct.Struct("<Q")


def save_tenants(directory: Path, keys: Mapping[str, Sequence[bytes]]) -> None:
    """Write whose the keys are, in place of what was saved before; a failure is logged."""
    names = list(keys)[:NAMES_MAX]
    rows = b"".join(_ROW.pack(key, number) for number, name in enumerate(names) for key in keys[name])
    data = MAGIC + msgspec.json.encode(names) + b"\n" + rows
    temporary = directory / f"{FILE_NAME}.new"
    try:
        temporary.write_bytes(data + _CHECK.pack(kernels.xxh3(data)))
        os.replace(temporary, directory / FILE_NAME)
    except OSError as error:
        _log.warning("%s cannot be written: %s", directory / FILE_NAME, error)


def load_tenants(directory: Path) -> Iterator[tuple[bytes, str]]:
    """(key, tenant) of what was saved; nothing if there is no file or it is not one of ours."""
    path = directory / FILE_NAME
    try:
        names, rows = _parse(path.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        _log.warning("%s: its chunks count for no tenant: %s", path, error)
        return
    for key, number in _ROW.iter_unpack(rows):
        if number < len(names):
            yield key, names[number]


def _parse(data: bytes) -> tuple[list[str], bytes]:
    """Names and rows of a file. Raises ValueError."""
    body = data[: -_CHECK.size]
    if not body.startswith(MAGIC) or _CHECK.pack(kernels.xxh3(body)) != data[-_CHECK.size :]:
        raise ValueError("damaged, or of another version")
    names, newline, rows = body[len(MAGIC) :].partition(b"\n")
    if not newline or len(rows) % _ROW.size:
        raise ValueError("it ends early")
    try:
        return msgspec.json.decode(names, type=list[str]), rows
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
