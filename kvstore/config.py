"""Settings: what there is to set, and where each value came from.

TOML file < environment (`KVSTORE_SERVICE__PORT=9000`; `__` nests) < command-line flags. Unknown names are refused with
the nearest valid one. `kvstore config show` prints the result and each value's origin. docs/configuration.md lists
every field; a test compares.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from kvstore.errors import ConfigError
from kvstore.keys import DEFAULT_CHUNK_TOKENS, KEY_BYTES
from kvstore.sizes import parse_bytes
from kvstore.spec import CHUNK_TOKENS_MAX
from kvstore.store_settings import StoreSettings
from kvstore.tenants import TenantConfig, check_tenants
from kvstore.transcode import AS_IS

ENV_PREFIX = "KVSTORE_"
_FINGERPRINT = re.compile(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}")
_ENV_NOT_SETTINGS = {"KVSTORE_CONFIG", "KVSTORE_ISA", "KVSTORE_KERNELS", "KVSTORE_PROFILES", "KVSTORE_TOKEN"}
"""Variables that others read: where profiles and gate records are, what an engine's connector is given."""

_MISSING = re.compile(r"Object missing required field `(\w+)`")


class TierConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tier, `[tiers.NAME]`. Tiers are used in the order they are written, fastest first.

    `kind` is the NAME unless given. `capacity` is the hard bound, e.g. "8GiB". `path` is the directory of a tier that
    has one, or the directories of an nvme tier on several disks. `codec` is what chunks are put into on their way to
    the tier, as CODEC or CODEC@LEVEL; on the first tier it is what the store asks writers for. `policy` says who is
    evicted first and `admission` who may enter, by name; empty for the default of the tier's kind. `ttl` is how long a
    chunk stays unused, e.g. "7d"; empty: until its room is needed. `options` go to the tier as they are.
    """

    capacity: str | int
    kind: str = ""
    path: str | list[str] = ""
    codec: str = AS_IS
    policy: str = ""
    admission: str = ""
    ttl: str | float = ""
    options: dict[str, Any] = {}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model's name stands for where routers ask by name, `[service.models."NAME"]`.

    `fingerprint` are the 64 hexadecimal characters that connectors tell; `chunk_tokens` and `salt` are what they were
    given.
    """

    fingerprint: str
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    salt: str = ""


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The daemon, `[service]`.

    `port` 0 lets the system choose; -1 turns TCP off. `socket` is the UNIX socket; "" turns it off. With `token_file`
    every TCP request needs `Authorization: Bearer <token>`. `instance_id` is what routers know this daemon by, and
    `models` which models they may ask about.
    """

    host: str = "127.0.0.1"
    port: int = 8650
    socket: str = ""
    token_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    request_bytes_max: str | int = "1GiB"
    request_keys_max: int = 65536
    inflight_max: int = 64
    event_listeners_max: int = 16
    session_staging_bytes_max: str | int = "256MiB"
    lease_ttl_seconds: float = 30.0
    stop_seconds_max: float = 10.0
    instance_id: str = "kvstore"
    models: dict[str, ModelConfig] = {}

    def __post_init__(self) -> None:
        if parse_bytes(self.request_bytes_max, "service.request_bytes_max") < 1:
            raise ConfigError(f"service.request_bytes_max is {self.request_bytes_max!r}; it must be positive")
        parse_bytes(self.session_staging_bytes_max, "service.session_staging_bytes_max")
        if not -1 <= self.port <= 65535:
            raise ConfigError(f"service.port is {self.port}; it must be in -1..65535")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("service.tls_cert and service.tls_key are needed together")
        for field in (
            "request_keys_max",
            "inflight_max",
            "event_listeners_max",
            "lease_ttl_seconds",
            "stop_seconds_max",
        ):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"service.{field} is {getattr(self, field)}; it must be positive and finite")
        for name, model in self.models.items():
            if not _FINGERPRINT.fullmatch(model.fingerprint):
                raise ConfigError(
                    f"service.models.{name}.fingerprint is {model.fingerprint!r:.80}; "
                    f"give the {2 * KEY_BYTES} hexadecimal characters of the model's fingerprint"
                )
            if not 1 <= model.chunk_tokens <= CHUNK_TOKENS_MAX:
                raise ConfigError(
                    f"service.models.{name}.chunk_tokens is {model.chunk_tokens}; it must be in 1..{CHUNK_TOKENS_MAX}"
                )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything there is to set."""

    tiers: dict[str, TierConfig] = {}
    store: StoreSettings = StoreSettings()
    service: ServiceConfig = ServiceConfig()
    tenants: dict[str, TenantConfig] = {}
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        if self.log_level not in levels:
            raise ConfigError(f"log_level is {self.log_level!r}; use one of {', '.join(levels)}")
        check_tenants(self.tenants, self.tiers)


_ENTRIES: dict[tuple[type[msgspec.Struct], str], type[msgspec.Struct]] = {
    (Config, "tiers"): TierConfig,
    (Config, "tenants"): TenantConfig,
    (ServiceConfig, "models"): ModelConfig,
}
"""Tables whose names the user chooses -> what each entry is."""


class Settings:
    """Layers of raw values, later ones over earlier ones, and each value's origin."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def add_file(self, path: str | os.PathLike[str]) -> None:
        """Add a TOML file. Raises ConfigError if it cannot be read or parsed."""
        try:
            with Path(path).open("rb") as file:
                self.add(tomllib.load(file), str(path))
        except OSError as error:
            raise ConfigError(f"configuration file {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration file {path}: {error}") from error

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """Add `KVSTORE_…` variables."""
        for name, value in sorted(environment.items()):
            if name.startswith(ENV_PREFIX) and name not in _ENV_NOT_SETTINGS:
                self.add_value(name.removeprefix(ENV_PREFIX).lower().split("__"), value, f"environment {name}")

    def add_value(self, path: Iterable[str], value: Any, origin: str) -> None:
        """Add one value by its path."""
        nested = value
        for name in reversed(list(path)):
            nested = {name: nested}
        self.add(nested, origin)

    def add(self, values: Mapping[str, Any], origin: str) -> None:
        """Add a nested mapping."""
        _merge(self._values, values, origin, self.origins, ())

    def resolve(self) -> Config:
        """The validated configuration. Raises ConfigError naming the field and the remedy."""
        _check_names(self._values, Config, (), self.origins)
        try:
            return msgspec.convert(self._values, Config, strict=False)
        except msgspec.ValidationError as error:
            cause = error.__cause__
            if isinstance(cause, ConfigError):
                raise cause from error
            raise _named(error, self._values) from error


def load(
    path: str | None = None, *, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> tuple[Config, dict[str, str]]:
    """The configuration and the origin of every value that is not a default."""
    settings = Settings()
    environment = os.environ if environment is None else environment
    path = path or environment.get("KVSTORE_CONFIG")
    if path:
        settings.add_file(path)
    settings.add_environment(environment)
    for name, value in (flags or {}).items():
        settings.add_value(name.split("."), value, "flag")
    return settings.resolve(), settings.origins


def _named(error: msgspec.ValidationError, values: Mapping[str, Any]) -> ConfigError:
    """What `error` says of the raw values, with the whole name of the setting; msgspec leaves out names users chose."""
    for path, entry in (("tiers", TierConfig), ("tenants", TenantConfig), ("service.models", ModelConfig)):
        table: Any = values
        for name in path.split("."):
            table = table.get(name) if isinstance(table, Mapping) else None
        for name, fields in table.items() if isinstance(table, Mapping) else ():
            try:
                msgspec.convert(fields, entry, strict=False)
            except msgspec.ValidationError as own:
                return _said(own, f"{path}.{name}")
    return _said(error, "")


def _said(error: msgspec.ValidationError, table: str) -> ConfigError:
    what, _, place = str(error).partition(" - at `$")
    setting = (table + place.rstrip("`")).lstrip(".")
    missing = _MISSING.fullmatch(what)
    if missing is not None:
        return ConfigError(f"{setting}.{missing[1]} is missing; set it")
    return ConfigError(f"configuration: {what} - at `{setting}`")


def unknown_name(kind: str, name: str, valid: Iterable[str], origin: str = "") -> ConfigError:
    """The error for a name that does not exist, with the nearest that does."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name.rpartition(".")[2], valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid are: {', '.join(valid)}"
    return ConfigError(f"unknown {kind} {name!r}{f' ({origin})' if origin else ''}; {hint}")


def _merge(
    into: dict[str, Any], values: Mapping[str, Any], origin: str, origins: dict[str, str], path: tuple[str, ...]
) -> None:
    for name, value in values.items():
        here = (*path, name)
        if isinstance(value, Mapping):
            child = into.setdefault(name, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{'.'.join(here)} is a value in one place and a table in another ({origin})")
            _merge(child, value, origin, origins, here)
        else:
            into[name] = value
            origins[".".join(here)] = origin


def _check_names(values: Mapping[str, Any], struct: Any, path: tuple[str, ...], origins: Mapping[str, str]) -> None:
    hints = get_type_hints(struct)
    for name, value in values.items():
        dotted = ".".join((*path, name))
        if name not in hints:
            origin = next((o for key, o in origins.items() if key == dotted or key.startswith(dotted + ".")), "")
            raise unknown_name("setting", dotted, hints, origin)
        if not isinstance(value, Mapping):
            continue
        entry = _ENTRIES.get((struct, name))
        if entry is not None:
            for key, fields in value.items():
                if isinstance(fields, Mapping):
                    _check_names(fields, entry, (*path, name, key), origins)
        elif isinstance(hints[name], type) and issubclass(hints[name], msgspec.Struct):
            _check_names(value, hints[name], (*path, name), origins)
