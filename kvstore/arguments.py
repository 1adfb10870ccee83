"""What a caller may ask of a store: checks that raise ConfigError, naming the argument."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from kvstore.client import DEADLINE_MS_DEFAULT, DEADLINE_MS_MAX, QUALITY_EXACT, PutChunk
from kvstore.errors import ConfigError
from kvstore.keys import KEY_BYTES, ROOT

OWNER_CHARACTERS_MAX = 128
PIN_PRIORITY_MAX = 255


def deadline_at(deadline_ms: float | None, *, longest_ms: float = DEADLINE_MS_MAX) -> float:
    """time.monotonic seconds of a deadline given from now, `longest_ms` at most; None means DEADLINE_MS_DEFAULT.

    Raises:
        ConfigError: it is negative.
    """
    if deadline_ms is None:
        deadline_ms = DEADLINE_MS_DEFAULT
    if not deadline_ms >= 0:
        raise ConfigError(f"deadline_ms is {deadline_ms}; it must not be negative")
    return time.monotonic() + min(deadline_ms, longest_ms) / 1000


def check_fetch(order: str, min_quality: int, max_quality: int | None = None, *, decode: bool) -> None:
    """Raise ConfigError unless a fetch may be asked for like this."""
    if order not in ("chunk", "layer"):
        raise ConfigError(f"order is {order!r}; use chunk or layer")
    if not isinstance(min_quality, int) or not 0 <= min_quality <= QUALITY_EXACT:
        raise ConfigError(f"min_quality is {min_quality!r}; it must be in 0..{QUALITY_EXACT}")
    if max_quality is not None:
        if not isinstance(max_quality, int) or not min_quality <= max_quality < QUALITY_EXACT:
            raise ConfigError(
                f"max_quality is {max_quality!r}; it must be a level, not below min_quality, or None for all"
            )
        if decode:
            raise ConfigError("max_quality does not go with decode: the store decodes all levels")
    if decode and order != "chunk":
        raise ConfigError("decode needs order 'chunk': a chunk is decoded whole")


def check_key(key: bytes) -> None:
    """Raise ConfigError unless the key is 32 bytes."""
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ConfigError(f"a chunk key is {KEY_BYTES} bytes, not {key!r:.60}")


def check_place(key: bytes, parent: bytes) -> None:
    """Raise ConfigError unless a chunk of that key may be stored behind `parent`."""
    check_key(key)
    check_key(parent)
    if key in (ROOT, parent):
        raise ConfigError(f"chunk key {key.hex()} is {'all zeros' if key == ROOT else 'its own parent'}; see KeyScheme")


def check_room(nbytes_max: int) -> None:
    """Raise ConfigError unless room for so many bytes may be asked for."""
    if not isinstance(nbytes_max, int) or nbytes_max < 1:
        raise ConfigError(f"nbytes_max is {nbytes_max!r}; give the most bytes that the container may have")


def write_chunk(chunk: PutChunk, buffer: memoryview) -> int:
    """Bytes of the container that the caller's `write` has put into `buffer`. Raises ConfigError if they cannot be."""
    nbytes = chunk.write(buffer)
    if not isinstance(nbytes, int) or not 0 < nbytes <= chunk.nbytes_max:
        raise ConfigError(
            f"write of chunk {chunk.key.hex()[:12]} answered {nbytes!r:.80} bytes; nbytes_max is {chunk.nbytes_max}"
        )
    return nbytes


def check_keys(keys: Sequence[bytes]) -> None:
    """Raise ConfigError unless every key is 32 bytes."""
    for key in keys:
        check_key(key)


def check_pin(ttl_seconds: float, owner: str, priority: int) -> None:
    """Raise ConfigError unless chunks may be pinned so."""
    if not 0 < ttl_seconds < math.inf:
        raise ConfigError(f"ttl_seconds is {ttl_seconds}; it must be positive")
    if not 0 <= priority <= PIN_PRIORITY_MAX:
        raise ConfigError(f"priority is {priority}; of a pin it must be in 0..{PIN_PRIORITY_MAX}")
    check_owner(owner)


def check_owner(owner: str) -> None:
    """Raise ConfigError unless pins may be held in that name."""
    if not isinstance(owner, str) or len(owner) > OWNER_CHARACTERS_MAX:
        raise ConfigError(f"owner is {owner!r:.80}; it must be text of at most {OWNER_CHARACTERS_MAX} characters")
