"""Both sides of blending in vLLM over a store, without vLLM: a small model computes, blocks hold what it computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from kvstore.client import Client
from kvstore.connectors.hf_spec import kv_spec
from kvstore.connectors.vllm.access import StoreAccess
from kvstore.connectors.vllm.blend_messages import Blended
from kvstore.connectors.vllm.blend_model import RowsModel
from kvstore.connectors.vllm.blend_planning import BlendPlanner
from kvstore.connectors.vllm.blend_plans import BlendPlans
from kvstore.connectors.vllm.blend_worker import Blending
from kvstore.connectors.vllm.layouts import kv_views
from kvstore.connectors.vllm.paged import BlockRange, HeadShare, PagedKV, Staging
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.keys import KeyScheme
from kvstore.testing.blending import full_prefill
from kvstore.testing.chunks import FINGERPRINT
from kvstore.testing.vllm import cache_tensors
from kvstore.testing.vllm_layers import VllmShaped

BLOCK = 4
BLOCKS = 64
CHUNK = 8
CONTEXT_TOKENS = 200
WAIT_SECONDS = 20.0


class FakeBlendRequest(msgspec.Struct):
    """What vLLM's scheduler knows of a request."""

    request_id: str
    all_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None
    num_computed_tokens: int = 0
    num_prompt_tokens: int = 0
    lora_request: object = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.all_token_ids)


class FakeAccess(StoreAccess):
    """The way to a store that is there already."""

    def __init__(self, settings: VllmSettings, store: Client) -> None:
        super().__init__(settings)
        self.store = store

    def client(self) -> Client:
        """The store."""
        return self.store


class FakeFinder:
    """Knows the model from the start."""

    def __init__(self, found: RowsModel | str) -> None:
        self.found = found

    def model(self) -> RowsModel | str:
        """The model, or why there is none."""
        return self.found

    def close(self) -> None:
        """Nothing to end."""


class BlendEngine:
    """One scheduler and one worker of a model.

    Args:
        model: of transformers; stands for the one that vLLM has loaded.
        store: where documents are.
        policy: of blending, with its options.
        blend: further settings of blending.
        planner: further arguments of the planner.
    """

    def __init__(
        self,
        model: Any,
        store: Client,
        policy: str = "recommended",
        *,
        blend: dict[str, Any] | None = None,
        planner: dict[str, Any] | None = None,
        **options: float,
    ) -> None:
        chosen = {"policy": policy, "options": options, "ungated": True, **(blend or {})}
        given = {"url": "unix:/nowhere", "chunk_tokens": CHUNK, "codec": "raw", "load_threads": 1, "blend": chosen}
        self.settings = msgspec.convert(given, VllmSettings)
        assert self.settings.blend is not None
        self.model, self.spec = model, kv_spec(model)
        dim = self.spec.key_dim
        caches = cache_tensors("LBHNC", self.spec, BLOCKS, BLOCK, seed=3)
        views = [
            kv_views("FLASH_ATTN", cache, heads=self.spec.kv_heads, key_dim=dim, value_dim=dim) for cache in caches
        ]
        self.pages = PagedKV(self.spec, views, HeadShare(0, self.spec.kv_heads), BLOCK)
        access = FakeAccess(self.settings, store)
        self.finder = FakeFinder(RowsModel(VllmShaped(model)))
        self.worker = Blending(self.settings, self.settings.blend, access, self.pages, self.finder)  # type: ignore[arg-type]
        self.plans = BlendPlans(access, self.scheme, CONTEXT_TOKENS)
        more = {"caches_prefixes": False, "lookup_deadline_ms": WAIT_SECONDS * 1e3, **(planner or {})}
        self.planner = BlendPlanner(self.plans, self.scheme, block_tokens=BLOCK, **more)
        self._next_block = 0

    def scheme(self, salt: str) -> KeyScheme:
        """The keys of a salt's documents."""
        return KeyScheme(FINGERPRINT, chunk_tokens=CHUNK, extras={"cache_salt": salt} if salt else {})

    def blocks(self, tokens: int) -> list[int]:
        """New blocks for so many tokens, in no order."""
        first, self._next_block = self._next_block, self._next_block - (-tokens // BLOCK)
        return list(range(self._next_block - 1, first - 1, -1))

    def compute(self, ids: Sequence[int], blocks: list[int], start: int, stop: int) -> None:
        """Tokens start..stop of a prompt come into blocks as the model computes them."""
        _, cache = full_prefill(self.model, ids)
        staging = Staging(self.spec, stop - start, self.pages.device)
        for (keys, values), layer in zip(staging.layers, cache.layers, strict=True):
            keys.copy_(layer.keys[0, :, start:stop])
            values.copy_(layer.values[0, :, start:stop])
        self.pages.scatter(staging, start, start, stop, BlockRange(0, blocks))

    def read(self, blocks: list[int], stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of the first `stop` tokens in blocks, (heads, tokens, dim) a layer."""
        staging = Staging(self.spec, stop, self.pages.device)
        self.pages.gather(staging, 0, stop, BlockRange(0, blocks))
        return list(staging.layers)

    def store_document(self, preamble: list[int], document: list[int], **fields: Any) -> dict[str, Any] | None:
        """A request that computes a document and has it stored; its answer."""
        wish = {"kvstore": {"store_document": {"preamble_tokens": len(preamble)}}}
        request = FakeBlendRequest("document", preamble + document, wish, **fields)
        assert self.planner.add(request)
        blocks = self.blocks(len(request.all_token_ids))
        self.compute(request.all_token_ids, blocks, 0, len(request.all_token_ids))
        half = len(request.all_token_ids) // 2
        assert self.planner.documents({"document": half}, lambda _: blocks) == []
        request.num_computed_tokens = half
        self.worker.store(self.planner.documents({"document": len(request.all_token_ids) - half}, lambda _: blocks))
        self.worker._storer.submit(int).result(WAIT_SECONDS)
        return self.planner.finished(request)

    def matched(self, request: FakeBlendRequest, local: int = 0) -> int:
        """What the planner answers once it knows."""
        assert self.planner.add(request)
        plan = self.planner._entries[request.request_id].plan
        if plan is not None:
            plan.result(WAIT_SECONDS)
        tokens = self.planner.matched(request, local)
        assert tokens is not None
        return tokens

    def blend(self, request: FakeBlendRequest, local: int = 0) -> tuple[int, list[int]]:
        """Have a request put together behind its first `local` tokens: how many were to be, and its blocks."""
        external = self.matched(request, local)
        blocks = self.blocks(len(request.all_token_ids))
        if local:
            self.compute(request.all_token_ids, blocks, 0, local)
        self.planner.allocated(request, blocks, external)
        self.worker.start(self.planner.take_jobs())
        self.worker._loader.submit(int).result(WAIT_SECONDS)
        self.worker.advance()
        return external, blocks

    def report(self) -> list[Blended]:
        """What the worker reports, passed on to the scheduler's side."""
        found = self.worker.report()
        self.planner.report(found)
        return found

    def close(self) -> None:
        """End both sides."""
        self.plans.close()
        self.worker.close()
