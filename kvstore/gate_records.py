"""Gate records as bytes and files: canonical JSON, named by its SHA-256, beside the profiles.

A record is the sorted, unspaced JSON of a `GateRecord`; its id is the SHA-256 of those bytes, its file
`<id in hex>.kvgate` in a directory of `KVSTORE_PROFILES`. A file that is damaged, renamed or contradicts itself counts
as not there: nothing is served because of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec

from kvstore.decoding import decode_json
from kvstore.errors import ConfigError, ContainerError
from kvstore.gate import GateRecord, judge
from kvstore.outcome import Reason

Record = TypeVar("Record")

SUFFIX = ".kvgate"
DIRECTORIES_VARIABLE = "KVSTORE_PROFILES"
"""The directories of profiles, which records share."""

RECORD_BYTES_MAX = 1 << 20
RECORDS_MAX = 4096
"""Files of a directory that are read; a model has a handful."""

_log = logging.getLogger(__name__)


def pack_record(record: GateRecord) -> bytes:
    """The bytes of a record; equal records give equal bytes."""
    return msgspec.json.encode(record, order="sorted")


def parse_record(data: bytes | memoryview, *, record_id: bytes | None = None) -> GateRecord:
    """The checked record that the bytes are, the one of that id if given.

    Raises:
        ContainerError: with the reason (too_large, malformed, wrong_key).
    """
    check_named(data, record_id)
    try:
        record = decode_json(data, GateRecord)
    except (msgspec.MsgspecError, ConfigError, UnicodeDecodeError, RecursionError) as error:
        raise ContainerError(Reason.MALFORMED, f"gate record: {error}") from error
    if any(previous.level >= result.level for previous, result in zip(record.levels, record.levels[1:], strict=False)):
        raise ContainerError(Reason.MALFORMED, "gate record: levels are not in order")
    for result in record.levels:
        if result.failures != judge(result.metrics, record.limits):
            raise ContainerError(Reason.MALFORMED, f"gate record contradicts itself at level {result.level}")
    return record


def check_named(data: bytes | memoryview, record_id: bytes | None) -> None:
    """Raise ContainerError unless bytes may be a record, and are those of that SHA-256 if one is given."""
    if len(data) > RECORD_BYTES_MAX:
        raise ContainerError(Reason.TOO_LARGE, f"gate record of {len(data)} bytes; at most {RECORD_BYTES_MAX}")
    if record_id is not None and hashlib.sha256(data).digest() != record_id:
        raise ContainerError(Reason.WRONG_KEY, f"bytes are not gate record {record_id.hex()[:12]}")


def save(record: GateRecord, directory: str | Path) -> Path:
    """Write a record under its name into a directory, whole or not at all; answers the path.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    return write_named(pack_record(record), directory, SUFFIX)


def write_named(data: bytes, directory: str | Path, suffix: str) -> Path:
    """Write bytes under their SHA-256 into a directory, whole or not at all; answers the path. Raises ConfigError."""
    path = Path(directory) / f"{hashlib.sha256(data).hexdigest()}{suffix}"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write the gate record to {directory}: {error.strerror}") from error
    return path


def directories() -> list[Path]:
    """The directories that profiles and records lie in."""
    return [Path(name) for name in os.environ.get(DIRECTORIES_VARIABLE, "").split(os.pathsep) if name]


def load_all(places: Iterable[str | Path] | None = None) -> tuple[GateRecord, ...]:
    """Every good record of the directories (None: those of KVSTORE_PROFILES); bad ones are named in the log."""
    return read_named(places, SUFFIX, lambda data, record_id: parse_record(data, record_id=record_id))


def read_named(
    places: Iterable[str | Path] | None, suffix: str, parse: Callable[[bytes, bytes], Record]
) -> tuple[Record, ...]:
    """What `parse(bytes, SHA-256 in the name)` makes of the files; those that it raises on are named in the log."""
    records = []
    for place in directories() if places is None else places:
        for path in islice(sorted(Path(place).glob(f"*{suffix}")), RECORDS_MAX):
            try:
                with path.open("rb") as file:
                    data = file.read(RECORD_BYTES_MAX + 1)
                records.append(parse(data, bytes.fromhex(path.name.removesuffix(suffix))))
            except (ContainerError, OSError, ValueError) as error:
                _log.warning("gate record %s is ignored: %s", path, error)
    return tuple(records)
