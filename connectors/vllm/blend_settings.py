"""Settings of blended requests in vLLM."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import msgspec

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.connectors.blend.policy import Policy

_FINGERPRINT = re.compile("[0-9a-f]{64}")

SALT_PREFIX = "blend:"
"""A request whose `cache_salt` begins so may be given blended KV; no other request ever is."""


class BlendSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`blend` in `kv_connector_extra_config`; docs/blend.md explains each.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    policy: str = "recommended"
    options: dict[str, float | int | None] = {}
    purpose: Literal["strict", "standard", "coarse"] = "standard"
    gated_as: str = ""
    ungated: bool = False
    deadline_ms: float = 60_000.0

    def __post_init__(self) -> None:
        if not self.deadline_ms > 0:
            raise ConfigError(f"blend.deadline_ms is {self.deadline_ms}; give a positive number of milliseconds")
        if self.gated_as and not _FINGERPRINT.fullmatch(self.gated_as):
            raise ConfigError(f"blend.gated_as is {self.gated_as!r:.80}; give a fingerprint, 64 hexadecimal digits")

    def chosen(self) -> Policy:
        """The policy.

        Raises:
            ConfigError: there is none of this name and with these options, or vLLM cannot go on behind it.
        """
        from kvstore.connectors.blend import registry  # torch and transformers, which not every engine has

        policy = registry.get(self.policy, **self.options)
        if self.policy == "chunk_score":
            raise ConfigError(
                "blend.policy 'chunk_score' reads statistics of chunks, which vLLM does not make; use another policy"
            )
        if policy.split is not None:
            raise ConfigError(
                f"blend.policy {self.policy!r} needs its own attention for every generated token, and vLLM has its "
                "own kernels for that; use another policy"
            )
        return policy
