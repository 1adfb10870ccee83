"""`--purpose` and `--limit` of `kvstore gate`, for codecs and for blending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from kvstore.config import unknown_name
from kvstore.errors import ConfigError
from kvstore.gate_limits import AnswerLimits

Limits = TypeVar("Limits", bound=AnswerLimits)


def limits_of(purposes: Mapping[str, Limits], purpose: str, changes: Sequence[str]) -> Limits:
    """The limits of a purpose, with changes that are written NAME=VALUE. Raises ConfigError naming what is wrong."""
    if purpose not in purposes:
        raise unknown_name("purpose", purpose, purposes)
    limits = purposes[purpose]
    values: dict[str, float] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--limit {change!r}: write NAME=VALUE")
        if name not in limits.__struct_fields__:
            raise unknown_name("limit", name, limits.__struct_fields__)
        try:
            values[name] = int(value) if name == "scored_tokens_min" else float(value)
        except ValueError as error:
            raise ConfigError(f"--limit {name}: {value!r} is not a number") from error
    return msgspec.structs.replace(limits, **values)
