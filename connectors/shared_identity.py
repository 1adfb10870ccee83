"""The name of a checkpoint's KV that different engines share, where each has been told to.

Engines round differently, so by default the KV of one is never read by another: its fingerprint has the engine's own
settings in it. With `share_between_engines` on both sides the name is of the checkpoint alone: the bytes of its weight
files, what its configuration says, and the KVSpec. docs/engines.md says how far the numbers are then apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvstore.connectors.vllm.identity import COSMETIC, checkpoint_digest
from kvstore.errors import UnsupportedModelError
from kvstore.spec import KVSpec, fingerprint

_ROPE_FIELDS = frozenset({"partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta"})
"""Written in different ways by different versions; the KVSpec has what they mean."""


def check_shareable(spec: KVSpec, files: Sequence[Path], config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError unless an engine's model is the checkpoint's, as far as its configuration tells.

    Args:
        spec: geometry of the model's KV.
        files: the checkpoint's weight files.
        config: the configuration that the engine runs with.
    """
    if spec.rope.kind == "unknown":
        raise UnsupportedModelError(
            "share_between_engines: the rotary embedding is not a plain one, and engines may apply it differently"
        )
    for name, value in _stated(files).items():
        if config.get(name, value) != value:
            raise UnsupportedModelError(
                f"share_between_engines: {name} is {config[name]!r} in the engine and {value!r} in the checkpoint's "
                "configuration; start the engine without overrides"
            )


def shared_fingerprint(spec: KVSpec, files: Sequence[Path]) -> bytes:
    """32-byte name of a checkpoint's KV, the same for every engine; reads all its weights.

    Raises:
        OSError: a file cannot be read.
    """
    stated = msgspec.json.encode(_stated(files), order="sorted").decode()
    return fingerprint(spec, checkpoint_digest(files), settings={"engine": "shared", "config": stated})


def _stated(files: Sequence[Path]) -> dict[str, Any]:
    """What the checkpoint's configuration says that changes numbers, but for the rotary embedding."""
    path = files[0].parent / "config.json"
    try:
        stated = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"share_between_engines: {path} cannot be read: {error}") from error
    return {name: value for name, value in stated.items() if name not in COSMETIC | _ROPE_FIELDS}
