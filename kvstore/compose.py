"""Puts a store together from its configuration: the one place in the core that knows the registries."""

from __future__ import annotations

from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.sizes import parse_bytes
from kvstore.store import Store
from kvstore.tier import Tier


def open_store(config: Config) -> Store:
    """A store with the configured tiers, opened in order; those already open are closed if one fails.

    Raises:
        ConfigError: no tier, an unknown kind, or a bad option.
        TierError: a tier cannot start.
    """
    from kvstore.tiers import registry

    if not config.tiers:
        raise ConfigError('no tier is configured; add for example [tiers.dram] with capacity = "1GiB"')
    tiers: list[Tier] = []
    try:
        for name, tier in config.tiers.items():
            capacity_bytes = parse_bytes(tier.capacity, f"tiers.{name}.capacity")
            options = dict(tier.options)
            if tier.path:
                options["path"] = tier.path
            tiers.append(registry.open_tier(tier.kind or name, name=name, capacity_bytes=capacity_bytes, **options))
        return Store(tiers, config.store)
    except BaseException:
        for opened in tiers:
            opened.close()
        raise
