"""One prompt from plan to logits: load the exact beginning, load and blend documents, compute what is left.

Whatever does not come is computed. A chunk that is lost while a blend runs ends the run, because everything behind the
chunk has attended to it, and the next run goes without; when nothing is left to reuse, what remains is an ordinary
prefill behind the exact beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvstore.blend_control import BlendControl, BlendDecision, BlendWork
from kvstore.codec import Codec
from kvstore.connectors.blend.engine import blend_into
from kvstore.connectors.blend.landing import WantedChunk
from kvstore.connectors.blend.loading import SpanLoader, SpansLostError
from kvstore.connectors.blend.outcomes import Reused
from kvstore.connectors.blend.passing import BlendPass, has_ratio, with_ratio
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.prompt import Prompt, assemble
from kvstore.connectors.blend.sources import KV, Source, document_numbers
from kvstore.connectors.hf_generate import Ids
from kvstore.connectors.prefix import PrefixStore, replaceable
from kvstore.connectors.store_errors import unavailable
from kvstore.connectors.torch_kv import TorchKV
from kvstore.cost import CostModel
from kvstore.errors import ConfigError, SpecError
from kvstore.gate import Verdict
from kvstore.outcome import Miss
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.span_planning import recompute_all
from kvstore.spans import Span

LayerOf = Callable[[int], KV]
Noise = tuple[tuple[float, float], ...] | None


class BlendRun:
    """Fills the memory of one prompt.

    Args:
        model: in eval mode.
        prefixes: the store, and the model's prefixes in it.
        memory: one row with room for the prompt.
        ids: the prompt.
        policy: chooses what is computed again.
        gate: what may be blended.
        control: decides whether, and how much of it, by time.
        costs: told of what computing took.
        pipelined: compute while loading.
        min_quality: of chunks, see `Client`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefixes: PrefixStore,
        memory: TorchKV,
        ids: Ids,
        *,
        policy: Policy,
        gate: BlendPass,
        control: BlendControl,
        costs: CostModel,
        pipelined: bool = True,
        min_quality: int = 0,
    ) -> None:
        self._model = model
        self._prefixes = prefixes
        self._memory = memory
        self._ids: list[int] = ids.tolist()
        self._policy = policy
        self._gate = gate
        self._control = control
        self._costs = costs
        self._pipelined = pipelined
        self._min_quality = min_quality
        self._chain = prefixes.chain(ids)
        self.state = Reused(tokens=len(ids), plan=SpanPlan(spans=()), plan_ms=0.0)

    def fill(self, options: PlanOptions) -> torch.Tensor:
        """The logits of the last token, (1, vocabulary), once the memory has the KV of all tokens."""
        state = self.state
        if self._gate.verdict.passed:
            state.plan, state.plan_ms = self._plan(options)
        else:
            state.detail = self._gate.verdict.reason
            span = Span(kind="recompute", start=0, stop=state.tokens, detail=state.detail)
            state.plan = SpanPlan(spans=(span,))
        content = [span for span in state.plan.spans if span.kind == "content"]
        if not content:
            self._load_prefix(state.tokens - 1)
            return self._compute_rest(state.exact_loaded)
        first = state.plan.spans[0]
        self._load_prefix(first.stop if first.kind == "prefix" else 0)
        work = self._work(content)
        decision = self._control.decide(
            work, ratio=self._gate.ratio, lowest=self._gate.lowest, fixed=not has_ratio(self._policy)
        )
        if decision.ratio is None:
            state.detail = decision.detail
            return self._compute_rest(state.exact_loaded)
        return self._blend(content, work, decision)

    def _plan(self, options: PlanOptions) -> tuple[SpanPlan, float]:
        started = time.perf_counter()
        try:
            plan = self._prefixes.client.plan(self._ids, self._prefixes.keys, options)
        except (ConfigError, SpecError):
            raise
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            plan = recompute_all(len(self._ids), unavailable(error), options)
        return plan, (time.perf_counter() - started) * 1e3

    def _load_prefix(self, tokens_max: int) -> None:
        state = self.state
        state.loaded = self._prefixes.load(self._chain, self._memory, tokens_max)
        state.exact_loaded = min(state.loaded.chunks * self._prefixes.keys.chunk_tokens, tokens_max)

    def _compute(self, first: int, stop: int, *, logits_tokens: int) -> torch.Tensor:
        """Compute tokens first..stop behind an exact beginning; the last `logits_tokens` ones' logits, (n, vocabulary).

        Without logits it answers their hidden states, and the largest matrix of a small model is not touched.
        """
        started = time.perf_counter()
        called: Any = self._model if logits_tokens else self._model.base_model
        output = called(
            torch.tensor([self._ids[first:stop]], device=self._model.device),
            past_key_values=self._memory.cache(first),
            use_cache=True,
            **({"logits_to_keep": logits_tokens} if logits_tokens else {}),
        )
        ms = self._until_done(started)
        self.state.compute_ms += ms
        self._costs.observe_prefill(tokens=stop - first, context=first, ms=ms)
        answer: torch.Tensor = output.logits[0] if logits_tokens else output.last_hidden_state[0]
        return answer

    def _compute_rest(self, first: int) -> torch.Tensor:
        """Compute what stands behind an exact beginning, and store the chunks of the prompt: all of them are exact."""
        logits = self._compute(first, self.state.tokens, logits_tokens=1)
        self._store(len(self._chain))
        return logits

    def _store(self, chunks: int) -> None:
        """Store the first chunks of the prompt, which are exact, as far as they were not loaded."""
        loaded = self.state.loaded
        replace = replaceable(loaded)
        self.state.stored = self._prefixes.store(self._chain[:chunks], loaded.chunks, self._memory, replace=replace)

    def _work(self, content: Sequence[Span]) -> BlendWork:
        """What there is to load and to compute, as far as it is known before anything has come."""
        prompt = self._prompt([(span, _nothing, None) for span in content], content[0].start)
        chooser = self._policy.begin(prompt)
        scouted = int((prompt.query | prompt.fresh).sum()) if chooser.scouts else 0
        return BlendWork(
            layers=prompt.layers,
            prompt_tokens=prompt.tokens,
            exact_tokens=content[0].start,
            moved_tokens=int(prompt.moved.sum()),
            query_rows=scouted,
            compared_layers=getattr(self._policy, "check_layer", -1) + 1 if chooser.compares else 0,
            loads=tuple((span.tiers[0] if span.tiers else "", max(1, sum(span.nbytes))) for span in content),
        )

    def _blend(self, content: Sequence[Span], work: BlendWork, decision: BlendDecision) -> torch.Tensor:
        """Blend what comes of the content; compute everything if nothing does."""
        assert decision.ratio is not None
        state, spec = self.state, self._prefixes.spec
        begin = content[0].start
        loader = SpanLoader(
            self._prefixes.client,
            [_wanted(span) for span in content],
            spec,
            self._prefixes.keys.fingerprint,
            self._judge,
            tokens_max=self._prefixes.keys.chunk_tokens,
            wait_ms=decision.wait_ms,
            min_quality=self._min_quality,
            costs=self._costs,
        )
        with loader:
            if state.exact_loaded < begin:
                self._compute(state.exact_loaded, begin, logits_tokens=0)
            started = time.perf_counter()
            loader.wait(0 if self._pipelined else spec.layers - 1)
            logits = None
            while logits is None and len(lost := loader.lost()) < len(content):
                logits = self._attempt(content, lost, loader, work, decision.ratio)
            state.compute_ms += self._until_done(started)
            state.lost = {content[index].start: miss for index, miss in lost.items()}
            state.content_bytes, state.waited_ms = loader.nbytes, loader.waited_ms
            state.load_ms_content = loader.load_ms
        if logits is None:
            state.detail = "no chunk of a document has come"
            return self._compute_rest(begin)
        self._store(begin // self._prefixes.keys.chunk_tokens)
        return logits

    def _attempt(
        self, content: Sequence[Span], lost: dict[int, Miss], loader: SpanLoader, work: BlendWork, ratio: float
    ) -> torch.Tensor | None:
        """One blended run over what is not lost; None if more is."""
        state = self.state
        here = [index for index in range(len(content)) if index not in lost]
        parts = [(content[index], _layers_of(loader, index), self._noise(loader, index)) for index in here]
        prompt = self._prompt(parts, content[0].start)
        started, waited_ms = time.perf_counter(), loader.waited_ms
        policy = with_ratio(self._policy, ratio)
        try:
            logits, report = blend_into(self._model, self._prefixes.spec, prompt, policy, self._memory, logits_tokens=1)
        except SpansLostError:
            state.discarded_runs += 1
            return None
        state.blend, state.ratio = report, ratio if has_ratio(self._policy) else None
        state.used = tuple(content[index] for index in here)
        if not lost:
            self._control.observe(work, ratio, self._until_done(started) - (loader.waited_ms - waited_ms))
        return logits

    def _prompt(self, parts: Sequence[tuple[Span, LayerOf, Noise]], begin: int) -> Prompt:
        """The prompt over its exact beginning and these spans; pieces that follow one another are one document."""
        sources = []
        if begin:
            sources.append(Source(0, self._ids[:begin], self._beginning(begin), exact=True, document=-1))
        documents = document_numbers([(span.start, span.stop, span.position) for span, _, _ in parts])
        for document, (span, layer, noise) in zip(documents, parts, strict=True):
            ids = self._ids[span.start : span.stop]
            sources.append(Source(span.start, ids, layer, position=span.position, document=document, noise=noise))
        return assemble(self._ids, sources, self._prefixes.spec.layers)

    def _beginning(self, stop: int) -> LayerOf:
        def layer(index: int) -> KV:
            keys, values = self._memory.layers[index]
            return keys[0, :, :stop], values[0, :, :stop]

        return layer

    def _noise(self, loader: SpanLoader, index: int) -> Noise:
        coding = loader.coding(index)
        return None if coding is None else self._gate.noise(*coding)

    def _judge(self, codec: Codec, level: int) -> Verdict:
        return self._gate.of(codec, level)

    def _until_done(self, started: float) -> float:
        """Milliseconds since then, once the device has done what it was asked to."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return (time.perf_counter() - started) * 1e3


def _wanted(span: Span) -> WantedChunk:
    return WantedChunk(
        key=span.keys[0],
        tokens=span.tokens,
        position=span.position,
        tier=span.tiers[0] if span.tiers else "",
        nbytes=max(1, sum(span.nbytes)),
    )


def _layers_of(loader: SpanLoader, index: int) -> LayerOf:
    return lambda layer: loader.layer(index, layer)


def _nothing(layer: int) -> KV:
    raise AssertionError("nothing is computed while the work is estimated")
