"""kvstore: a tiered store for the KV cache of LLM inference. Public names live here; docs/ has the guides."""

from kvstore.client import ChunkInfo, Client, Part, PutChunk
from kvstore.connect import connect
from kvstore.context import Context
from kvstore.errors import (
    CodecError,
    ConfigError,
    ContainerError,
    KVStoreError,
    ServiceError,
    ServiceUnavailableError,
    SpecError,
    TierError,
    UnsupportedModelError,
    VolumeBusyError,
    VolumeFormatError,
)
from kvstore.keys import KeyScheme
from kvstore.outcome import Lookup, Miss, PutStatus, Reason
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.spans import Document, Span
from kvstore.spec import KVSpec, Rope, fingerprint

__version__ = "0.1.0"

__all__ = [
    "ChunkInfo",
    "Client",
    "CodecError",
    "ConfigError",
    "ContainerError",
    "Context",
    "Document",
    "KVSpec",
    "KVStoreError",
    "KeyScheme",
    "Lookup",
    "Miss",
    "Part",
    "PlanOptions",
    "PutChunk",
    "PutStatus",
    "Reason",
    "Rope",
    "ServiceError",
    "ServiceUnavailableError",
    "Span",
    "SpanPlan",
    "SpecError",
    "TierError",
    "UnsupportedModelError",
    "VolumeBusyError",
    "VolumeFormatError",
    "__version__",
    "connect",
    "fingerprint",
]
