"""`KVStoreConnector`: vLLM's side of the connector, a thin shell around `planning` and `transfers`.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"url": "unix:/run/kvstore.sock"}}'

vLLM makes one instance in its scheduler and one in each worker. No exception leaves a hook once the engine has started.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tp_group

from kvstore.connectors.vllm.access import StoreAccess, check_codec
from kvstore.connectors.vllm.blend_messages import Blended, BlendJob, DocumentJob
from kvstore.connectors.vllm.blend_planning import BlendPlanner
from kvstore.connectors.vllm.blend_plans import BlendPlans
from kvstore.connectors.vllm.blend_refusals import check_blendable, check_layout
from kvstore.connectors.vllm.geometry import checkpoint_files, read_geometry
from kvstore.connectors.vllm.hooks import guarded
from kvstore.connectors.vllm.layouts import kv_views
from kvstore.connectors.vllm.lookups import Lookups
from kvstore.connectors.vllm.messages import StepPlan, StepReport
from kvstore.connectors.vllm.naming import ModelName
from kvstore.connectors.vllm.paged import HeadShare, PagedKV
from kvstore.connectors.vllm.planning import Planner
from kvstore.connectors.vllm.plugin import register
from kvstore.connectors.vllm.ranks import HeadExchange
from kvstore.connectors.vllm.settings import read_settings
from kvstore.connectors.vllm.stats import PromMetrics, Stats
from kvstore.connectors.vllm.transfers import Transfers
from kvstore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvstore.connectors.vllm.blend_worker import Blending

RANK_SLACK_SECONDS = 30.0
"""Longest wait of one tensor-parallel rank for another, beyond the deadlines of the store."""


@dataclass
class Metadata(KVConnectorMetadata):
    """What the scheduler's instance tells the workers'."""

    plan: StepPlan = field(default_factory=StepPlan)
    blends: list[BlendJob] = field(default_factory=list)
    documents: list[DocumentJob] = field(default_factory=list)


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """What a worker's instance tells the scheduler's."""

    report: StepReport = field(default_factory=StepReport)
    blended: list[Blended] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Both workers' words."""
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(self.report.merge(other.report), self.blended + other.blended)


class KVStoreConnector(KVConnectorBase_V1):
    """See the module's text.

    Raises:
        ConfigError, CodecError: a setting is wrong.
        UnsupportedModelError: the engine's KV cannot be served; names what and why.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = read_settings(transfer.kv_connector_extra_config)
        check_codec(self._settings.codec)
        self._geometry = read_geometry(vllm_config, kv_cache_config)
        self._access = StoreAccess(self._settings)
        self._transfers: Transfers | None = None
        self._blending: Blending | None = None
        self._blends: BlendPlanner | None = None
        if self._settings.blend is not None:
            check_blendable(self._settings.blend, self._settings.load, vllm_config, self._geometry)
        if role is KVConnectorRole.SCHEDULER:
            model = vllm_config.model_config
            self._name = ModelName(
                self._settings,
                self._geometry.spec,
                checkpoint_files(vllm_config, self._settings),
                {**model.hf_config.to_dict(), "model_dtype": str(model.dtype)},
                model.quantization or "",
            )
            self._lookups = Lookups(self._access, self._name.scheme_wait)
            self._planner = Planner(
                self._settings,
                block_tokens=self._geometry.block_tokens,
                workers=self._geometry.ranks,
                lookups=self._lookups,
                scheme=self._name.scheme,
                reads=transfer.is_kv_consumer,
                writes=transfer.is_kv_producer,
            )
            if self._settings.blend is not None:
                self._plans = BlendPlans(self._access, self._name.scheme_wait, model.max_model_len)
                self._blends = BlendPlanner(
                    self._plans,
                    self._name.scheme,
                    block_tokens=self._geometry.block_tokens,
                    lookup_deadline_ms=self._settings.lookup_deadline_ms,
                    caches_prefixes=bool(vllm_config.cache_config.enable_prefix_caching),
                    reads=transfer.is_kv_consumer,
                    writes=transfer.is_kv_producer,
                )

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a save that is lost is a miss later on."""
        return False

    # The workers' side, in the order of vLLM's calls.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take note of the engine's blocks. Raises UnsupportedModelError if their layout is not known."""
        spec, ranks = self._geometry.spec, self._geometry.ranks
        group = get_tp_group()
        share = HeadShare.of(spec.kv_heads, ranks, group.rank_in_group)
        layers = []
        for name in self._geometry.layer_names:
            if name not in kv_caches:
                raise UnsupportedModelError(f"the attention layer {name!r} has no KV of its own")
            layers.append(
                kv_views(
                    self._layout(name),
                    kv_caches[name],
                    heads=share.stop - share.start,
                    key_dim=spec.key_dim,
                    value_dim=spec.value_dim,
                )
            )
        exchange = None
        if ranks > 1 and self._kv_transfer_config.is_kv_producer:
            seconds = self._settings.store_deadline_ms / 1e3 + RANK_SLACK_SECONDS
            exchange = HeadExchange(
                group.ranks, group.rank_in_group, spec, self._settings.chunk_tokens, timeout_seconds=seconds
            )
        pages = PagedKV(spec, layers, share, self._geometry.block_tokens)
        self._transfers = Transfers(self._settings, self._access, pages, exchange)
        if self._settings.blend is not None:
            # Code that who does not blend has no use for.
            from kvstore.connectors.vllm.blend_model import ModelFinder
            from kvstore.connectors.vllm.blend_worker import Blending

            check_layout(self._layout(self._geometry.layer_names[0]))
            attention = self._vllm_config.compilation_config.static_forward_context[self._geometry.layer_names[0]]
            finder = ModelFinder(self._vllm_config.model_config.architecture, attention)
            self._blending = Blending(self._settings, self._settings.blend, self._access, pages, finder)

    @guarded(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Stop reading the blocks of preempted requests, before they are written again."""
        if self._transfers is not None:
            self._transfers.abandon(_plan(kv_connector_metadata))

    @guarded(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start this step's loads, and end those that the forward pass needs."""
        if self._transfers is not None:
            self._transfers.load(_plan(self._connector_metadata))
        if self._blending is not None and isinstance(self._connector_metadata, Metadata):
            self._blending.start(self._connector_metadata.blends)
            self._blending.advance()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: what the forward pass needs has been loaded before it."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: chunks of all layers are saved after the forward pass."""

    @guarded(lambda: None)
    def wait_for_save(self) -> None:
        """Queue this step's saves; does not wait for them."""
        if self._transfers is not None:
            self._transfers.save(_plan(self._connector_metadata))
        if self._blending is not None and isinstance(self._connector_metadata, Metadata):
            self._blending.store(self._connector_metadata.documents)

    @guarded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks are no longer read, and requests whose load has ended."""
        if self._transfers is None:
            return None, None
        sent, received = self._transfers.finished()
        return sent, received if self._blending is None else received | self._blending.finished()

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded."""
        bad = set() if self._transfers is None else self._transfers.bad_blocks()
        return bad if self._blending is None else bad | self._blending.bad_blocks()

    @guarded(lambda: None)
    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        """What the scheduler's instance has to know."""
        report = None if self._transfers is None else self._transfers.report()
        blended = [] if self._blending is None else self._blending.report()
        return WorkerMetadata(report or StepReport(), blended) if report is not None or blended else None

    # The scheduler's side.

    @guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """Ask the store about the prompt."""
        if self._blends is None or not self._blends.add(request):
            self._planner.add(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that the store has behind those the engine has; None while that is not known."""
        if self._blends is not None and self._blends.owns(request):
            tokens = self._blends.matched(request, num_computed_tokens)
            return tokens, bool(tokens)
        return self._planner.matched(request, num_computed_tokens)

    @guarded(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of what is to be loaded into the request's blocks."""
        if num_external_tokens and self._blends is not None and self._blends.owns(request):
            self._blends.allocated(request, blocks.get_block_ids()[0], num_external_tokens)
        elif num_external_tokens:
            self._planner.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    @guarded(Metadata)
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers shall do at this step."""
        scheduled = scheduler_output.num_scheduled_tokens
        blocks = scheduler_output.kv_connector_block_state

        def blocks_of(request_id: str) -> list[int]:
            ids: list[int] = blocks.get_block_ids(request_id)[0]
            return ids

        busy = self._blends is not None and self._blends.busy
        plan = self._planner.plan(scheduled, blocks_of, scheduler_output.preempted_req_ids or (), busy=busy)
        named = plan.named(self._name.now())
        if self._blends is None:
            return Metadata(named)
        return Metadata(named, self._blends.take_jobs(), self._blends.documents(scheduled, blocks_of))

    @guarded(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of what the workers have done."""
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, WorkerMetadata):
            self._planner.report(metadata.report)
            if self._blends is not None:
                self._blends.report(metadata.blended)

    @guarded(lambda: (False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks must be kept until they have been saved, and what was made of its wishes."""
        return self._planner.finished(request), None if self._blends is None else self._blends.finished(request)

    def reset_cache(self) -> bool:
        """Share nothing with what was stored before: the weights may have been changed in place."""
        self._name.renew()
        return True

    # Both sides.

    @guarded(lambda: None)
    def get_kv_connector_stats(self) -> Stats | None:
        """What has been counted since the last call."""
        if self._role is KVConnectorRole.SCHEDULER:
            counts: dict[str, Any] = self._planner.take_counts()
            counts |= {} if self._blends is None else self._blends.take_counts()
        else:
            counts = {} if self._transfers is None else self._transfers.counts()
            for name, value in ({} if self._blending is None else self._blending.counts()).items():
                counts[name] = counts.get(name, 0) + value
        return Stats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        """The counters in another process."""
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """The counters on vLLM's Prometheus endpoint."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @guarded(lambda: None)
    def shutdown(self) -> None:
        """End what is under way, within the store's deadline."""
        if self._blending is not None:
            self._blending.close()
        if self._transfers is not None:
            self._transfers.close(self._settings.store_deadline_ms / 1e3)
        if self._role is KVConnectorRole.SCHEDULER:
            self._lookups.close()
        if self._blends is not None:
            self._plans.close()
        self._access.close()

    def _layout(self, name: str) -> str:
        """The layout of a layer's blocks, as `layouts` names it."""
        layer = self._vllm_config.compilation_config.static_forward_context[name]
        backend: str = layer.get_attn_backend().get_name()
        return f"{backend}/{getattr(layer, 'isa', 'unknown')}" if backend == "CPU_ATTN" else backend


def _plan(metadata: KVConnectorMetadata | None) -> StepPlan:
    assert isinstance(metadata, Metadata)
    return metadata.plan


register()  # by its module path alone vLLM's MultiConnector would not find it
