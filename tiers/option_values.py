"""Options of tiers as TOML, the environment and flags bring them, in the types that the tier declares.

From the environment and from `--set` every value is text, which is read as what the tier wants: `false`, `4`, `0.5`,
and for options whose name ends in `_bytes` also sizes such as `4MiB`.
"""

from __future__ import annotations

import inspect
from typing import Any

from kvstore.errors import ConfigError
from kvstore.sizes import parse_bytes

_PLAIN = {"bool", "int", "float", "str", "None"}
_BOOLS = {"true": True, "false": False}


def option_value(value: Any, parameter: inspect.Parameter, field: str) -> Any:
    """`value` in the type that the parameter is annotated with; as it is where that is more than one of a few.

    Raises:
        ConfigError: it is of another type; names `field` and what is wanted.
    """
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    wanted = {kind.strip() for kind in text.split("|")}
    if not wanted <= _PLAIN or (value is None and "None" in wanted) or (isinstance(value, str) and "str" in wanted):
        return value
    if "bool" in wanted:
        found = _BOOLS.get(value.lower()) if isinstance(value, str) else value
        return _checked(found, bool, value, field, "true or false")
    if "int" in wanted and parameter.name.endswith("_bytes"):
        return parse_bytes(value, field)
    if "int" in wanted:
        return _checked(_number(value, int), int, value, field, "a whole number")
    if "float" in wanted:
        return float(_checked(_number(value, float), (int, float), value, field, "a number"))
    return _checked(value, str, value, field, "text")


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    if not isinstance(value, str):
        return None if isinstance(value, bool) else value
    try:
        return kind(value)
    except ValueError:
        return None


def _checked(found: Any, kind: Any, value: Any, field: str, wanted: str) -> Any:
    if isinstance(found, kind):
        return found
    raise ConfigError(f"{field} is {value!r:.80}; give {wanted}")
