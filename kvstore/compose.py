"""Puts a store together from its configuration: the one place in the core that knows the registries."""

from __future__ import annotations

from kvstore import gate_records
from kvstore.config import Config
from kvstore.durations import parse_seconds
from kvstore.errors import ConfigError
from kvstore.sizes import parse_bytes
from kvstore.store import Store
from kvstore.tenants import quotas_of
from kvstore.tier import Tier
from kvstore.transcode import parse_recipe


def open_store(config: Config) -> Store:
    """A store with the configured tiers, opened in order; those already open are closed if one fails.

    Raises:
        ConfigError: no tier, an unknown kind, or a bad option.
        TierError: a tier cannot start.
    """
    from kvstore.codecs import registry as codecs
    from kvstore.tiers import registry

    if not config.tiers:
        raise ConfigError('no tier is configured; add for example [tiers.dram] with capacity = "1GiB"')
    recipes = {
        name: recipe
        for name, tier in config.tiers.items()
        if (recipe := parse_recipe(tier.codec, f"tiers.{name}.codec", codecs)) is not None
    }
    gates = gate_records.load_all() if any(not codecs.is_exact(recipe.codec) for recipe in recipes.values()) else ()
    tiers: list[Tier] = []
    try:
        for name, tier in config.tiers.items():
            capacity_bytes = parse_bytes(tier.capacity, f"tiers.{name}.capacity")
            kind = tier.kind or name
            if set_elsewhere := sorted({"name", "capacity_bytes"} & set(tier.options)):
                raise ConfigError(f"tiers.{name}.options.{set_elsewhere[0]} is no option; set tiers.{name}.capacity")
            options = registry.policy_options(kind, tier.policy, tier.admission) | tier.options
            if tier.ttl != "":
                options["ttl_seconds"] = parse_seconds(tier.ttl, f"tiers.{name}.ttl")
            if config.tenants and registry.keeps_quotas(kind):
                options["quotas"] = quotas_of(config.tenants, name, capacity_bytes)
            elif limited := [tenant for tenant, each in config.tenants.items() if name in each.quota]:
                raise ConfigError(f"tiers.{name} keeps no quotas; take tenants.{limited[0]}.quota.{name} away")
            if tier.path:
                options["path"] = tier.path
            tiers.append(registry.open_tier(kind, name=name, capacity_bytes=capacity_bytes, **options))
        return Store(tiers, config.store, codecs=codecs, recipes=recipes, gates=gates)
    except BaseException:
        for opened in tiers:
            opened.close()
        raise
