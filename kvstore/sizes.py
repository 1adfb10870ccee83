"""Byte sizes as people write them: "8GiB", "512 MiB", "4096"."""

from __future__ import annotations

import re

from kvstore.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "kb": 10**3, "mb": 10**6}
_UNITS |= {"gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int, field: str = "size") -> int:
    """Bytes of a size such as "8GiB". Raises ConfigError naming `field`."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{field} is {text!r}; write bytes or a size such as 512MiB or 8GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(nbytes: int) -> str:
    """A size a person reads, e.g. "1.5 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
