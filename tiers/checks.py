"""What a caller may ask of a tier: checks that raise ValueError, naming the argument."""

from __future__ import annotations

from kvstore.keys import KEY_BYTES
from kvstore.tier import PutItem, ReadItem


def check_key(key: bytes, parent: bytes) -> None:
    """Raise ValueError unless both are 32 bytes."""
    for field, value in (("key", key), ("parent key", parent)):
        if len(value) != KEY_BYTES:
            raise ValueError(f"{field} has {len(value)} bytes; it must have {KEY_BYTES}")


def check_put(item: PutItem) -> None:
    """Raise ValueError on a bad key or empty data."""
    check_key(item.key, item.parent)
    if not item.data.nbytes or not item.data.c_contiguous or item.data.itemsize != 1:
        raise ValueError("PutItem.data is empty or no contiguous bytes; give those of one container")


def check_read(item: ReadItem) -> None:
    """Raise ValueError on a target or offset that cannot be."""
    target = item.target
    if target.readonly or not target.nbytes or not target.c_contiguous or target.itemsize != 1:
        raise ValueError("ReadItem.target is empty, read-only or no contiguous bytes; give writable memory")
    if item.offset < 0:
        raise ValueError(f"ReadItem.offset is {item.offset}; it must not be negative")
