"""Records of the blend gate as bytes and files, beside those of codecs: canonical JSON, named by its SHA-256."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from kvstore.blend_gate import BlendRecord, judge
from kvstore.decoding import decode_json
from kvstore.errors import ConfigError, ContainerError
from kvstore.gate_records import check_named, read_named, write_named
from kvstore.outcome import Reason

SUFFIX = ".kvblend"


def pack_record(record: BlendRecord) -> bytes:
    """The bytes of a record; equal records give equal bytes."""
    return msgspec.json.encode(record, order="sorted")


def parse_record(data: bytes | memoryview, *, record_id: bytes | None = None) -> BlendRecord:
    """The checked record that the bytes are, the one of that id if given.

    Raises:
        ContainerError: with the reason (too_large, malformed, wrong_key).
    """
    check_named(data, record_id)
    try:
        record = decode_json(data, BlendRecord)
    except (msgspec.MsgspecError, ConfigError, UnicodeDecodeError, RecursionError) as error:
        raise ContainerError(Reason.MALFORMED, f"blend record: {error}") from error
    if record.failures != judge(record.metrics, record.limits):
        raise ContainerError(Reason.MALFORMED, "blend record contradicts itself")
    return record


def save(record: BlendRecord, directory: str | Path) -> Path:
    """Write a record under its name into a directory, whole or not at all; answers the path. Raises ConfigError."""
    return write_named(pack_record(record), directory, SUFFIX)


def load_all(places: Iterable[str | Path] | None = None) -> tuple[BlendRecord, ...]:
    """Every good record of the directories (None: those of KVSTORE_PROFILES); bad ones are named in the log."""
    return read_named(places, SUFFIX, lambda data, record_id: parse_record(data, record_id=record_id))
