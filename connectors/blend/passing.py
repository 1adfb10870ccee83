"""Whether a model, a policy and its ratio have passed the gate of blending, and what to say if they have not."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

import msgspec

from kvstore import blend_gate
from kvstore.codec import Codec
from kvstore.connectors.blend.policy import Policy
from kvstore.gate import Verdict

FIXED_RATIO = 0.0
"""Ratio in records of policies that have none: there is nothing to choose."""


def settings_of(policy: Policy) -> tuple[str, float]:
    """A policy's settings without its ratio as canonical JSON, and the ratio; FIXED_RATIO if it has none."""
    fields: dict[str, Any] = dataclasses.asdict(policy)  # type: ignore[call-overload]  # every policy is a dataclass
    ratio = fields.pop("ratio", None)
    return msgspec.json.encode(fields, order="sorted").decode(), FIXED_RATIO if ratio is None else float(ratio)


def has_ratio(policy: Policy) -> bool:
    """Whether the policy computes a share of the tokens that can be chosen."""
    return getattr(policy, "ratio", None) is not None


def with_ratio(policy: Policy, ratio: float) -> Policy:
    """The same policy with another ratio; itself if it has none."""
    if not has_ratio(policy):
        return policy
    changed: Policy = dataclasses.replace(policy, ratio=ratio)  # type: ignore[type-var]  # as above
    return changed


class BlendPass:
    """The records of the gate, asked about one policy on one model.

    Args:
        records: any, also of other models and policies.
        fingerprint: of the model.
        policy: with the ratio that is wanted.
        limits: what the records must keep to.
    """

    def __init__(
        self,
        records: Sequence[blend_gate.BlendRecord],
        fingerprint: bytes,
        policy: Policy,
        limits: blend_gate.BlendLimits,
    ) -> None:
        self._records = records
        self._fingerprint = fingerprint
        self._limits = limits
        self._name = policy.name
        self._settings, self.ratio = settings_of(policy)
        self.verdict = self.of()
        self.lowest = blend_gate.lowest_ratio(records, fingerprint, policy.name, self._settings, self.ratio, limits)

    def of(self, codec: Codec | None = None, level: int = 0) -> Verdict:
        """Whether chunks of a codec (None: an exact one), decoded up to a level, may be blended."""
        return blend_gate.check(
            self._records,
            self._fingerprint,
            self._name,
            self._settings,
            self.ratio,
            coding=codec,
            level=level,
            limits=self._limits,
        )

    def noise(self, codec: Codec, level: int) -> tuple[tuple[float, float], ...] | None:
        """What the level leaves of error in each layer, for policies that look for changes."""
        return blend_gate.noise_of(self._records, self._fingerprint, codec, level)


def command(policy: Policy, model: str, dtype: str, codec: Codec | None = None) -> str:
    """The command line that measures a policy, as it is set, on a model."""
    words = ["kvstore", "gate", "--blend", "--model", model or "MODEL", "--dtype", dtype, "--policy", policy.name]
    settings, ratio = settings_of(policy)
    default = settings_of(type(policy)())[0]
    if settings != default:
        words += ["--policy-settings", settings]
    if has_ratio(policy):
        words += ["--ratio", f"{ratio:g}"]
    if codec is not None and not codec.exact:
        words += ["--codecs", codec.id]
        words += ["--profile", f"{codec.profile.hex()}.kvprofile"] if any(codec.profile) else []
    return f"{shlex.join(words)} --text FILE..."
