"""Records of the quality gates as bytes and files: canonical JSON, named by its SHA-256, beside the profiles.

A record is the sorted, unspaced JSON of a struct; its id is the SHA-256 of those bytes, its file `<id in hex><suffix>`
in a directory of `KVSTORE_PROFILES`. A file that is damaged, renamed or contradicts itself counts as not there: nothing
is served because of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from kvstore.decoding import decode_json
from kvstore.errors import ConfigError, ContainerError
from kvstore.outcome import Reason

Record = TypeVar("Record", bound=msgspec.Struct)

DIRECTORIES_VARIABLE = "KVSTORE_PROFILES"
"""The directories of profiles, which records share."""

RECORD_BYTES_MAX = 1 << 20
RECORDS_MAX = 4096
"""Files of a directory that are read; a model has a handful."""

_log = logging.getLogger(__name__)


class RecordFiles(Generic[Record]):
    """The records of one kind.

    Args:
        kind: their struct.
        name: what messages call one.
        suffix: of their files.
        contradiction: what is wrong with a record whose fields are all in range, "" if nothing is.
    """

    def __init__(self, kind: type[Record], *, name: str, suffix: str, contradiction: Callable[[Record], str]) -> None:
        self._kind = kind
        self._name = name
        self._suffix = suffix
        self._contradiction = contradiction

    def pack(self, record: Record) -> bytes:
        """The bytes of a record; equal records give equal bytes."""
        return msgspec.json.encode(record, order="sorted")

    def parse(self, data: bytes | memoryview, *, record_id: bytes | None = None) -> Record:
        """The checked record that the bytes are, the one of that id if given.

        Raises:
            ContainerError: with the reason (too_large, malformed, wrong_key).
        """
        if len(data) > RECORD_BYTES_MAX:
            raise ContainerError(Reason.TOO_LARGE, f"{self._name} of {len(data)} bytes; at most {RECORD_BYTES_MAX}")
        if record_id is not None and hashlib.sha256(data).digest() != record_id:
            raise ContainerError(Reason.WRONG_KEY, f"bytes are not {self._name} {record_id.hex()[:12]}")
        try:
            record = decode_json(data, self._kind)
        except (msgspec.MsgspecError, ConfigError, UnicodeDecodeError, RecursionError) as error:
            raise ContainerError(Reason.MALFORMED, f"{self._name}: {error}") from error
        if wrong := self._contradiction(record):
            raise ContainerError(Reason.MALFORMED, f"{self._name}: {wrong}")
        return record

    def save(self, record: Record, directory: str | Path) -> Path:
        """Write a record under its name into a directory, whole or not at all; answers the path.

        Raises:
            ConfigError: the directory cannot be written to.
        """
        data = self.pack(record)
        path = Path(directory) / f"{hashlib.sha256(data).hexdigest()}{self._suffix}"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write the {self._name} to {directory}: {error.strerror}") from error
        return path

    def load_all(self, places: Iterable[str | Path] | None = None) -> tuple[Record, ...]:
        """Every good record of the directories (None: those of KVSTORE_PROFILES); bad ones are named in the log."""
        records = []
        for place in directories() if places is None else places:
            for path in islice(sorted(Path(place).glob(f"*{self._suffix}")), RECORDS_MAX):
                try:
                    with path.open("rb") as file:
                        data = file.read(RECORD_BYTES_MAX + 1)
                    records.append(self.parse(data, record_id=bytes.fromhex(path.name.removesuffix(self._suffix))))
                except (ContainerError, OSError, ValueError) as error:
                    _log.warning("%s %s is ignored: %s", self._name, path, error)
        return tuple(records)


def directories() -> list[Path]:
    """The directories that profiles and records lie in."""
    return [Path(name) for name in os.environ.get(DIRECTORIES_VARIABLE, "").split(os.pathsep) if name]
