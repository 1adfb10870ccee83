"""Who shares a store, and how much of each tier each of them may have: `[tenants.NAME]` of the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from kvstore.errors import ConfigError
from kvstore.sizes import parse_bytes

TENANT_HEADER = "X-KVStore-Tenant"
"""Names the tenant of a put, where the access token does not."""
TENANTS_MAX = 1024
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class TenantConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tenant, `[tenants.NAME]`. `quota` is the most that it may have of a tier, by the tier's name: a size such as
    "4GiB", or a share such as "25%"; a tier that is not named is limited by its capacity only. With `token_file` a TCP
    request that carries that token is the tenant's.
    """

    quota: dict[str, str | int] = {}
    token_file: str = ""


def check_tenant_name(name: str) -> None:
    """Raise ConfigError unless a tenant may have that name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"tenant {name!r:.80} is no name; use 1 to 64 letters, digits, '_', '-' or '.'")


def check_tenants(tenants: Mapping[str, TenantConfig], tiers: Mapping[str, object]) -> None:
    """Raise ConfigError naming what is wrong with a tenant: its name, a tier it names, a quota."""
    if len(tenants) > TENANTS_MAX:
        raise ConfigError(f"there are {len(tenants)} tenants; at most {TENANTS_MAX} are told apart")
    for name, tenant in tenants.items():
        check_tenant_name(name)
        for tier, quota in tenant.quota.items():
            field = f"tenants.{name}.quota.{tier}"
            if tier not in tiers:
                raise ConfigError(f"{field}: there is no tier {tier!r}; the tiers are: {', '.join(tiers) or 'none'}")
            quota_bytes(quota, 1, field)


def quota_bytes(quota: str | int, capacity_bytes: int, field: str) -> int:
    """The bytes of a quota in a tier of that capacity. Raises ConfigError naming `field`."""
    if isinstance(quota, str) and quota.rstrip().endswith("%"):
        try:
            percent = float(quota.rstrip()[:-1])
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            raise ConfigError(f"{field} is {quota!r}; a share is from '0%' to '100%'")
        return int(capacity_bytes * percent / 100)
    nbytes = parse_bytes(quota, field)
    if nbytes < 0:
        raise ConfigError(f"{field} is {quota!r}; it must not be negative")
    return nbytes


def quotas_of(tenants: Mapping[str, TenantConfig], tier: str, capacity_bytes: int) -> dict[str, int]:
    """The quota in bytes of every tenant in one tier; its capacity for those that have none there."""
    return {
        name: quota_bytes(tenant.quota.get(tier, "100%"), capacity_bytes, f"tenants.{name}.quota.{tier}")
        for name, tenant in tenants.items()
    }
