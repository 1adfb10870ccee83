"""Spans of time as people write them: "7d", "12h", "30 min", "45s"."""

from __future__ import annotations

import math
import re

from kvstore.errors import ConfigError

_UNITS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_SPAN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*")


def parse_seconds(text: str | float, field: str = "duration") -> float:
    """Seconds of a span such as "7d". Raises ConfigError naming `field` unless it is a positive one."""
    seconds = math.nan
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(text)
    elif isinstance(text, str) and (match := _SPAN.fullmatch(text.lower())) and match[2] in _UNITS:
        seconds = float(match[1]) * _UNITS[match[2]]
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{field} is {text!r}; write positive seconds or a span such as 45s, 30min, 12h or 7d")
    return seconds
