"""Outside data into structs, from many threads.

msgspec (0.22, at least) learns what a struct's fields are when it meets the type for the first time, and lets other
threads see it half done: two threads whose first decoding is of the same type can crash the process. Here every type is
met under a lock, once. Decoders that a module makes while it is imported need none of this, and prepare their types.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_lock = threading.Lock()
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def decode_json(data: bytes | memoryview, kind: type[T]) -> T:
    """JSON as a `kind`. Raises what `msgspec.json.decode` raises."""
    value: T = _decoder(kind).decode(data)
    return value


def convert(value: Any, kind: type[T]) -> T:
    """Builtin types as a `kind`. Raises msgspec.ValidationError."""
    _decoder(kind)
    return msgspec.convert(value, kind)


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    decoder = _decoders.get(kind)
    if decoder is None:
        with _lock:
            decoder = _decoders.get(kind) or msgspec.json.Decoder(kind)
            _decoders[kind] = decoder
    return decoder
