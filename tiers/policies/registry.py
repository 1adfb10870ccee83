"""Policies by name, as the configuration knows them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from kvstore.errors import ConfigError
from kvstore.tiers.policies.adaptive import AdaptivePolicy, WatchedAdmission
from kvstore.tiers.policies.admission import AlwaysAdmission, CostAdmission, SecondTouchAdmission
from kvstore.tiers.policies.arc import ArcPolicy
from kvstore.tiers.policies.gdsf import GdsfPolicy
from kvstore.tiers.policies.lru import LruPolicy
from kvstore.tiers.policies.predictive import PredictivePolicy
from kvstore.tiers.policies.s3fifo import S3FifoPolicy
from kvstore.tiers.policy import AdmissionPolicy, CachePolicy, EvictionPolicy

DEFAULT_EVICTION = "adaptive"
EVICTIONS = ("adaptive", "arc", "gdsf", "lru", "predictive", "s3fifo")
ADMISSIONS = ("adaptive", "always", "cost", "second_touch")


def open_policy(
    eviction: str = DEFAULT_EVICTION,
    admission: str = "",
    *,
    capacity_bytes: int,
    seed: int = 0,
    read_bytes_per_second: float = 1e9,
) -> CachePolicy:
    """A new policy for a tier of that capacity.

    Args:
        eviction: one of EVICTIONS.
        admission: one of ADMISSIONS; empty for `adaptive` with adaptive eviction, else `always`.
        capacity_bytes: the tier's bound.
        seed: of policies that draw at random.
        read_bytes_per_second: what the `cost` admission compares with.

    Raises:
        ConfigError: an unknown name, a combination that is none, or a value out of range.
    """
    if capacity_bytes < 1:
        raise ConfigError(f"capacity_bytes is {capacity_bytes}; it must be positive")
    policy = _eviction(eviction, capacity_bytes, seed)
    if not isinstance(policy, AdaptivePolicy):
        return CachePolicy(policy, _admission(admission or "always", capacity_bytes, read_bytes_per_second))
    if admission in ("", "adaptive"):
        return CachePolicy(policy, policy)
    other = _admission(admission, capacity_bytes, read_bytes_per_second)
    return CachePolicy(policy, WatchedAdmission(policy, other))


def _eviction(name: str, capacity_bytes: int, seed: int) -> EvictionPolicy:
    match name:
        case "adaptive":
            return AdaptivePolicy(capacity_bytes)
        case "arc":
            return ArcPolicy(capacity_bytes)
        case "gdsf":
            return GdsfPolicy(capacity_bytes)
        case "lru":
            return LruPolicy(capacity_bytes)
        case "predictive":
            return PredictivePolicy(capacity_bytes, seed=seed)
        case "s3fifo":
            return S3FifoPolicy(capacity_bytes)
    raise _unknown("eviction", name, EVICTIONS)


def _admission(name: str, capacity_bytes: int, read_bytes_per_second: float) -> AdmissionPolicy:
    match name:
        case "always":
            return AlwaysAdmission()
        case "second_touch":
            return SecondTouchAdmission(capacity_bytes)
        case "cost":
            return CostAdmission(read_bytes_per_second)
        case "adaptive":
            raise ConfigError("admission policy 'adaptive' needs eviction policy 'adaptive'; change one of them")
    raise _unknown("admission", name, ADMISSIONS)


def _unknown(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(valid)}"
    return ConfigError(f"unknown {kind} policy {name!r}; {hint}")
