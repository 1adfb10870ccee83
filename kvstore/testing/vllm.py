"""What vLLM's scheduler, its KV caches and a store are to the vLLM connector, for tests."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import msgspec
import torch

from kvstore.connectors.torch_kv import TORCH_DTYPE
from kvstore.connectors.vllm.lookups import Answer
from kvstore.connectors.vllm.planning import Planner
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.keys import KeyScheme
from kvstore.outcome import Lookup, Miss, Reason
from kvstore.spec import KVSpec
from kvstore.testing.chunks import FINGERPRINT

CHUNK = 8
BLOCK = 4
KEYS = KeyScheme(FINGERPRINT, chunk_tokens=CHUNK)


class FakeRequest(msgspec.Struct):
    """What vLLM's scheduler knows of a request."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    lora_request: object = None

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class FakeLookups:
    """A store that has the chunks in `there`, in `tiers` or dram; answers at once unless `slow`."""

    def __init__(self, there: set[bytes] | None = None) -> None:
        self.there = there or set()
        self.slow = False
        self.pending: list[tuple[Future[Answer], list[bytes]]] = []
        self.asked = 0
        self.chunk_bytes = 1000
        self.tiers: list[str] = []

    def ask(self, tokens: object, cache_salt: str) -> Future[Answer]:
        self.asked += 1
        future: Future[Answer] = Future()
        chain = KEYS.chain(tokens)  # type: ignore[arg-type]
        self.pending.append((future, chain))
        if not self.slow:
            self.answer()
        return future

    def answer(self) -> None:
        for future, chain in self.pending:
            found = next((index for index, key in enumerate(chain) if key not in self.there), len(chain))
            stop = Miss(Reason.ABSENT) if found < len(chain) else None
            tiers = self.tiers or ["dram"] * found
            lookup = Lookup(tuple(tiers[:found]), stop, (self.chunk_bytes,) * found)
            future.set_result(Answer(chain, lookup, time.monotonic()))
        self.pending.clear()


def planner(lookups: FakeLookups, *, workers: int = 1, **more: object) -> Planner:
    """A planner of small chunks and blocks."""
    given = msgspec.convert({"url": "unix:/nowhere", "chunk_tokens": CHUNK, **more}, VllmSettings)
    return Planner(given, block_tokens=BLOCK, workers=workers, lookups=lookups, scheme=lambda _: KEYS)


ORDERS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC", "LHBNC", "BHLNC")
"""Memory orders of vLLM's KV caches: L layers, B blocks, H heads, N tokens, C K and V."""


def cache_tensors(
    order: str, spec: KVSpec, blocks: int, block_tokens: int, *, seed: int | None = None
) -> list[torch.Tensor]:
    """What vLLM registers, (blocks, heads, tokens, K dim + V dim) a layer, in a memory order; random bits or zeros."""
    sizes = {
        "L": spec.layers,
        "B": blocks,
        "H": spec.kv_heads,
        "N": block_tokens,
        "C": spec.key_dim + spec.value_dim,
    }
    flat = torch.zeros([sizes[axis] for axis in order], dtype=TORCH_DTYPE[spec.dtype])
    if seed is not None:
        flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed)))
    return list(flat.permute([order.index(axis) for axis in "LBHNC"]).unbind(0))


def reference_kv(layout: str, cache: torch.Tensor, block: int, head: int, key_dim: int) -> tuple[Any, Any]:
    """K (tokens, dim) and V of one block and head, read number by number as the backend's kernels do."""
    content = cache[block, head]
    if not layout.startswith("CPU_ATTN/"):
        return content[:, :key_dim].clone(), content[:, key_dim:].clone()
    tokens, width = content.shape
    numbers = content.reshape(-1)
    keys = torch.stack([numbers[token : tokens * key_dim : tokens] for token in range(tokens)])
    return keys, numbers[tokens * key_dim :].reshape(tokens, width - key_dim).clone()
