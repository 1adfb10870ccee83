"""What a remote client and the daemon say to each other about plans: bodies of /v1/plan and /v1/plan_batch."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvstore.batching import BatchPlan, PrefixNode
from kvstore.cost_rates import CostRates
from kvstore.errors import ConfigError
from kvstore.keys import DEFAULT_CHUNK_TOKENS, KeyScheme, Tokens, token_array
from kvstore.outcome import Miss
from kvstore.protocol import HexBytes, Request, TokenId, parse_keys
from kvstore.span_plan import DOCUMENTS_MAX, PlanOptions, SpanPlan
from kvstore.spans import Document, Span, SpanKind, SpanReason
from kvstore.spec import CHUNK_TOKENS_MAX

PROMPTS_MAX = 4096

ChunkTokens = Annotated[int, msgspec.Meta(ge=1, le=CHUNK_TOKENS_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]


class DocumentBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Tokens start..stop of the prompt are a document; `token_ids` are its own, null where they are the prompt's."""

    start: Count
    stop: Count
    token_ids: list[TokenId] | None = None


class PlanRequest(Request, frozen=True, kw_only=True, omit_defaults=True):
    """plan: what to do about each token of a prompt. Keys are made as for a lookup by token ids.

    The other fields are those of `kvstore.span_plan.PlanOptions`.
    """

    token_ids: list[TokenId]
    fingerprint: str
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS
    salt: str = ""
    extras: dict[str, str | int | HexBytes] = msgspec.field(default_factory=dict)
    documents: Annotated[list[DocumentBody], msgspec.Meta(max_length=DOCUMENTS_MAX)] = msgspec.field(
        default_factory=list
    )
    preamble_tokens: Count = 0
    scan: bool = True
    any_preamble: bool = False
    context_tokens: Count | None = None
    recompute_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    rates: CostRates = CostRates()

    def options(self) -> PlanOptions:
        """The options that are asked for. Raises ConfigError."""
        return PlanOptions(
            documents=[Document(body.start, body.stop, body.token_ids) for body in self.documents],
            preamble_tokens=self.preamble_tokens,
            scan=self.scan,
            any_preamble=self.any_preamble,
            context_tokens=self.context_tokens,
            recompute_share=self.recompute_share,
            rates=self.rates,
        )


class SpanBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One span; see `kvstore.spans.Span`."""

    kind: SpanKind
    start: int
    stop: int
    keys: list[str] = []
    position: int = 0
    preamble_matches: bool = True
    tiers: tuple[str, ...] = ()
    nbytes: tuple[int, ...] = ()
    load_ms: float | None = None
    compute_ms: float | None = None
    reason: SpanReason | None = None
    detail: str = ""


class PlanReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to plan; see `kvstore.span_plan.SpanPlan`."""

    spans: list[SpanBody]
    load_ms: float | None = None
    compute_ms: float | None = None
    prefill_ms: float | None = None
    miss: Miss | None = None


class PlanBatchRequest(Request, frozen=True, kw_only=True):
    """plan_batch: the prefixes that prompts share, and the order that reuses most."""

    prompts: Annotated[list[list[TokenId]], msgspec.Meta(max_length=PROMPTS_MAX)]
    fingerprint: str
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS
    salt: str = ""
    extras: dict[str, str | int | HexBytes] = msgspec.field(default_factory=dict)
    cache_tokens: Count | None = None


class NodeBody(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the prefix tree; see `kvstore.batching.PrefixNode`."""

    parent: int | None
    start: int
    stop: int
    keys: list[str]
    prompts: tuple[int, ...]
    shared_by: int
    stored: int


class PlanBatchReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to plan_batch; see `kvstore.batching.BatchPlan`."""

    nodes: list[NodeBody]
    order: tuple[int, ...]
    tokens: int
    computed_tokens: int


def plan_request(tokens: Tokens, keys: KeyScheme, options: PlanOptions) -> PlanRequest:
    """What to ask a daemon. Raises SpecError."""
    return PlanRequest(
        token_ids=token_array(tokens).tolist(),
        fingerprint=keys.fingerprint.hex(),
        chunk_tokens=keys.chunk_tokens,
        salt=keys.salt.hex(),
        extras={
            name: HexBytes(value.hex()) if isinstance(value, bytes) else value for name, value in keys.extras.items()
        },
        documents=[
            DocumentBody(
                start=document.start,
                stop=document.stop,
                token_ids=None if document.tokens is None else token_array(document.tokens).tolist(),
            )
            for document in options.documents
        ],
        preamble_tokens=options.preamble_tokens,
        scan=options.scan,
        any_preamble=options.any_preamble,
        context_tokens=options.context_tokens,
        recompute_share=options.recompute_share,
        rates=options.rates,
    )


def plan_reply(plan: SpanPlan) -> PlanReply:
    """What to answer."""
    return PlanReply(
        spans=[SpanBody(**{**msgspec.structs.asdict(span), "keys": _hex(span.keys)}) for span in plan.spans],
        load_ms=plan.load_ms,
        compute_ms=plan.compute_ms,
        prefill_ms=plan.prefill_ms,
        miss=plan.miss,
    )


def parse_plan(reply: PlanReply, tokens: int) -> SpanPlan:
    """The plan in an answer about a prompt of so many tokens. Raises ConfigError if it is none."""
    spans, end = [], 0
    for index, body in enumerate(reply.spans):
        if body.start != end or body.stop <= end:
            raise ConfigError(f"spans[{index}] is {body.start}..{body.stop} behind token {end}")
        end = body.stop
        names = tuple(parse_keys(body.keys, f"spans[{index}].keys"))
        if (body.kind == "recompute") != (not names) or (body.kind == "content" and len(names) != 1):
            raise ConfigError(f"spans[{index}] is of kind {body.kind} and has {len(names)} keys")
        spans.append(Span(**{**msgspec.structs.asdict(body), "keys": names}))
    if end != tokens:
        raise ConfigError(f"the spans end at token {end} of {tokens}")
    return SpanPlan(
        spans=tuple(spans),
        load_ms=reply.load_ms,
        compute_ms=reply.compute_ms,
        prefill_ms=reply.prefill_ms,
        miss=reply.miss,
    )


def batch_reply(plan: BatchPlan) -> PlanBatchReply:
    """What to answer."""
    return PlanBatchReply(
        nodes=[_node(node) for node in plan.nodes],
        order=plan.order,
        tokens=plan.tokens,
        computed_tokens=plan.computed_tokens,
    )


def _node(node: PrefixNode) -> NodeBody:
    return NodeBody(**{**msgspec.structs.asdict(node), "keys": _hex(node.keys)})


def _hex(keys: tuple[bytes, ...]) -> list[str]:
    return [key.hex() for key in keys]
