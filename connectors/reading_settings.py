"""An engine's configuration of a connector as a struct: what is wrong with it is one line that names the setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from kvstore.config import unknown_name
from kvstore.decoding import convert
from kvstore.errors import ConfigError

Settings = TypeVar("Settings", bound=msgspec.Struct)


def read_struct(kind: type[Settings], given: Mapping[str, Any], place: str) -> Settings:
    """The settings in what an engine was configured with; all of them have a `url`.

    Args:
        kind: the settings; raises ConfigError for values that it refuses.
        given: what was configured.
        place: what messages call the place where that stands.

    Raises:
        ConfigError: a name or value is wrong, or there is no url; the message names it and says what to do.
    """
    for name in given:
        if name not in kind.__struct_fields__:
            raise unknown_name(f"setting in {place}", name, kind.__struct_fields__)
    if "url" not in given:
        raise ConfigError(f"{place} has no url; give the store's, e.g. unix:/run/kvstore.sock")
    try:
        return convert(dict(given), kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(f"{place}: {error}") from error
