"""Kinds of tier by name: those of this package, and those that installed packages bring.

A package brings one with an entry point of group `kvstore.tiers`: the kind's name, and a callable that makes the tier
from keyword arguments (`name` and `capacity_bytes` always, `path` and others as configured).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvstore.errors import ConfigError
from kvstore.tier import Tier
from kvstore.tiers.option_values import option_value

GROUP = "kvstore.tiers"

_OWN = {
    "dram": "kvstore.tiers.dram:DramTier",
    "hbm": "kvstore.tiers.hbm:HbmTier",
    "nvme": "kvstore.tiers.nvme:NvmeTier",
}

_POLICIES = {"dram": "adaptive", "nvme": "adaptive"}
"""Kind -> eviction policy where the configuration names none; docs/policies.md says why."""


def policy_options(kind: str, policy: str, admission: str) -> dict[str, str]:
    """The options that give a tier of that kind its policies; of those that are empty the kind's default, if any."""
    options = {"policy": policy or _POLICIES.get(kind, ""), "admission": admission}
    return {option: value for option, value in options.items() if value}


def _kinds() -> dict[str, EntryPoint]:
    """Entry points by kind; a package cannot replace a kind of this one."""
    own = {kind: EntryPoint(kind, where, GROUP) for kind, where in _OWN.items()}
    return {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)} | own


def available() -> list[str]:
    """The kinds there are."""
    return sorted(_kinds())


def keeps_quotas(kind: str) -> bool:
    """True if tiers of that kind can limit what each tenant has."""
    kinds = _kinds()
    return kind in kinds and "quotas" in inspect.signature(kinds[kind].load()).parameters


def open_tier(kind: str, *, name: str, capacity_bytes: int, **options: Any) -> Tier:
    """A new tier of that kind.

    Raises:
        ConfigError: no such kind or option, or an option's value is wrong; names the nearest valid one.
        TierError: it cannot start.
    """
    kinds = _kinds()
    if kind not in kinds:
        raise ConfigError(f"tiers.{name}.kind is {kind!r}; {_nearest(kind, list(kinds))}")
    factory: Callable[..., Tier] = kinds[kind].load()
    parameters = inspect.signature(factory).parameters
    for option, value in options.items():
        if option not in parameters:
            known = [parameter for parameter in parameters if parameter not in ("name", "capacity_bytes")]
            raise ConfigError(f"tiers.{name} has no option {option!r}; {_nearest(option, known)}")
        options[option] = option_value(value, parameters[option], f"tiers.{name}.options.{option}")
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in ("name", "capacity_bytes", *options):
            raise ConfigError(f"tiers.{name}.{parameter.name} is missing; a tier of kind {kind} needs it")
    try:
        return factory(name=name, capacity_bytes=capacity_bytes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tiers.{name}: {error}") from error


def _nearest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(valid))}"
