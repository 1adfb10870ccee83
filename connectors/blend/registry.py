"""The recompute policies by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from kvstore.connectors.blend.policies.chunk_score import ChunkScore
from kvstore.connectors.blend.policies.first_k import FirstK
from kvstore.connectors.blend.policies.hkvd import HighDeviation
from kvstore.connectors.blend.policies.none import Nothing
from kvstore.connectors.blend.policies.parallel import Parallel
from kvstore.connectors.blend.policies.query import QueryAttention
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.blend.policy import Policy
from kvstore.errors import ConfigError

DEFAULT = Recommended.name

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Nothing, FirstK, HighDeviation, QueryAttention, ChunkScore, Parallel, Recommended)
}


def get(name: str = DEFAULT, **settings: Any) -> Policy:
    """The policy of a name with these settings.

    Raises:
        ConfigError: no policy has the name, or it has no such setting; names what is there.
    """
    found = POLICIES.get(name)
    if found is None:
        raise ConfigError(
            f"blend policy {name!r} is unknown{_nearest(name, POLICIES)}; there are {', '.join(POLICIES)}"
        )
    known = [field.name for field in dataclasses.fields(found)]  # type: ignore[arg-type]  # every policy is a dataclass
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"blend policy {name!r} has no setting {setting!r}{_nearest(setting, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    return found(**settings)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""
