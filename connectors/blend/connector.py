"""The transformers connector that also reuses documents: anywhere in a prompt, blended to the quality of a prefill.

    connector = BlendConnector(model, kvstore.connect("unix:/run/kvstore.sock"), preamble=[bos, *system_prompt])
    connector.store_document(document_ids)
    sequences, reports = connector.generate(input_ids, max_new_tokens=100)

A prompt with no known document behind its stored prefix is served as `TransformersConnector` serves it. Blended KV
belongs to one request: of a blended prompt only what stands before the first reused document is stored, which is exact.
Documents are stored from runs of their own. docs/blend.md has the whole story.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import Cache, PreTrainedModel

from kvstore import blend_gate, blend_records
from kvstore.blend_control import PATIENCE, BlendControl
from kvstore.client import Client
from kvstore.connector import Stored
from kvstore.connectors.blend import registry
from kvstore.connectors.blend.documents import store_document
from kvstore.connectors.blend.engine import check_blendable
from kvstore.connectors.blend.outcomes import BlendedReport, Reused
from kvstore.connectors.blend.passing import BlendPass, command
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.run import BlendRun
from kvstore.connectors.hf_generate import HEADROOM_TOKENS, GenerateSettings, Ids, one_prompt, prompt_rows, run_generate
from kvstore.connectors.model_identity import identify
from kvstore.connectors.prefix import PrefixStore
from kvstore.connectors.torch_kv import TorchKV
from kvstore.connectors.transformers import TransformersConnector
from kvstore.container import FLAG_LOSSY_ALLOWED
from kvstore.cost_rates import CostRates
from kvstore.errors import ConfigError, SpecError
from kvstore.keys import Tokens, token_array
from kvstore.span_plan import PlanOptions
from kvstore.spans import Document

OnRefusal = Literal["raise", "compute"]


class BlendConnector(TransformersConnector):
    """A model, a store and a preamble: documents that are stored are not computed again, wherever they stand.

    Args:
        model: a model that `blend_prefill` accepts.
        client: the store, from `kvstore.connect`.
        preamble: token ids that prompts begin with (BOS, a fixed system prompt); documents are computed behind them.
            In a prompt that begins otherwise no document is reused.
        policy: chooses what is computed again; None for the default at its default ratio.
        blend_limits: what blending may do to the model, by the gate's records.
        blend_gates: records of `kvstore gate --blend`; None for those in the directories of KVSTORE_PROFILES.
        on_refusal: what to do without a pass: "raise" here, or "compute" every prompt without blending.
        patience: share of a prefill that may be lost with waiting in vain, see `kvstore.blend_control`.
        pipelined: compute on the first layers while later ones are loaded; False loads everything first.
        scan: look for known documents in prompts, too; False for those that the caller points out only.
        store_documents: store documents that the caller points out and the store has not got, after their prompt.
        settings: all others of `TransformersConnector`.

    Raises:
        UnsupportedModelError: the model cannot be blended on; names what and why.
        ConfigError: an argument is wrong, or blending has no pass for this model and policy; says how to get one.
        SpecError: a token id of the preamble is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: Client,
        *,
        preamble: Tokens = (),
        policy: Policy | None = None,
        blend_limits: blend_gate.BlendLimits = blend_gate.STANDARD,
        blend_gates: Sequence[blend_gate.BlendRecord] | None = None,
        on_refusal: OnRefusal = "raise",
        patience: float = PATIENCE,
        pipelined: bool = True,
        scan: bool = True,
        store_documents: bool = False,
        **settings: Any,
    ) -> None:
        check_blendable(model)
        if on_refusal not in ("raise", "compute"):
            raise ConfigError(f"on_refusal is {on_refusal!r}; use raise or compute")
        super().__init__(model, client, **settings)
        self.preamble = [int(token) for token in token_array(preamble)]
        self.policy = registry.get() if policy is None else policy
        if self.policy.split is not None:
            raise ConfigError(
                f"policy {self.policy.name!r} needs an attention of its own while generating; use another policy, or "
                "blend_prefill with split_attention"
            )
        self._pipelined, self._scan, self._store_documents = pipelined, scan, store_documents
        self._blend_limits = blend_limits
        self._blend_gates = blend_records.load_all() if blend_gates is None else tuple(blend_gates)
        self._control = BlendControl(
            self._costs,
            patience=patience,
            load_deadline_ms=self._load_deadline_ms,
            weighs=self._load_policy == "cost",
        )
        self._pass = self._ask_gate(self.fingerprint)
        if not self._pass[1].verdict.passed and on_refusal == "raise":
            raise ConfigError(f"{self._pass[1].verdict.reason}; get a pass with: {self._blend_command()}")

    def store_document(self, ids: Tokens) -> Stored:
        """Compute a document behind the preamble and store it, so that any prompt can reuse it; counts its pieces.

        Raises:
            ConfigError: the document is empty, or does not fit the model's context behind the preamble.
            SpecError: a token id is not in 0..2**32-1.
        """
        flags = 0 if self._limits is None else FLAG_LOSSY_ALLOWED
        tokens = [int(token) for token in token_array(ids)]
        return store_document(self.model, self._current(), self.preamble, tokens, flags=flags)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        *,
        headroom: int = HEADROOM_TOKENS,
        documents: Sequence[Document] = (),
    ) -> tuple[Cache, torch.Tensor, BlendedReport]:
        """The cache of a whole prompt, the logits of its last token (1, vocabulary), and what was done for it.

        Args:
            input_ids: one prompt, (1, tokens).
            headroom: tokens expected to follow.
            documents: where the prompt has documents, from left to right, if that is known.

        Raises:
            SpecError: `input_ids` is not one prompt of at least one token.
            ConfigError: documents that are empty, overlap, or do not fit the prompt; a prompt longer than the context.
            UnsupportedModelError: the model has been changed into one that cannot be served.
        """
        ids = one_prompt(input_ids)
        prefixes = self._current()
        memory = TorchKV.allocate(prefixes.spec, 1, len(ids) + headroom, self.model.device)
        logits, state = self._row(prefixes, ids, memory, documents)
        self._store_new(state, ids, documents)
        return memory.cache(len(ids)), logits, state.report()

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the list is of reports that say more
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        documents: Sequence[Sequence[Document]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, list[BlendedReport]]:
        """What `model.generate` answers for the same arguments over blended prompts, and a report for each.

        Of rows without documents the chunks that become full while generating are stored too; of blended ones nothing.

        Args:
            input_ids: prompts, (rows, tokens), shorter ones padded on the left.
            attention_mask: 1 for tokens, 0 for padding, same shape; without one it is inferred as transformers does.
            documents: of every row, counted from its first token; None if nothing is known.
            kwargs: settings of `model.generate`.

        Raises:
            SpecError: the mask is not left padding, a prompt is empty, or not every row has its list of documents.
            ConfigError, UnsupportedModelError: as `prefill`; a setting that cannot be served, by name.
        """
        given = GenerateSettings(kwargs, self.model.generation_config)
        given.check()
        mask = given.infer_mask(input_ids) if attention_mask is None else attention_mask
        prompts = prompt_rows(input_ids, mask)
        wanted = [()] * len(prompts) if documents is None else documents
        if len(wanted) != len(prompts):
            raise SpecError(f"{len(prompts)} prompts and {len(wanted)} lists of documents; give one for each prompt")
        for own, ids in zip(wanted, prompts, strict=True):
            self._options(ids, own).check(len(ids))  # all are checked before any is computed
        prefixes = self._current()
        width = input_ids.shape[1]
        memory = TorchKV.allocate(prefixes.spec, len(prompts), width + given.headroom_tokens(width), self.model.device)
        states = []
        for row, (ids, own) in enumerate(zip(prompts, wanted, strict=True)):
            padding = width - len(ids)
            memory.clear(row, padding)
            states.append(self._row(prefixes, ids, memory.row(row, padding), own)[1])
        cache = memory.cache(width - 1)  # the last token is computed again, by generate, whose logits these are
        done = run_generate(self.model, input_ids, mask, cache, kwargs)
        final = TorchKV.of(prefixes.spec, cache)
        for row, (state, sequence) in enumerate(zip(states, done.sequences.cpu().numpy(), strict=True)):
            state.compute_ms += (done.first_step - done.started) * 1e3
            padding = width - state.tokens
            if state.blend is None:
                chain = prefixes.chain(given.worth_storing(sequence[padding:], state.tokens))
                first = max(state.loaded.chunks, state.tokens // self._chunk_tokens)
                state.stored = state.stored.plus(prefixes.store(chain, first, final.row(row, padding)))
            self._store_new(state, prompts[row], wanted[row])
        return done.output, [state.report() for state in states]

    def _row(
        self, prefixes: PrefixStore, ids: Ids, place: TorchKV, documents: Sequence[Document]
    ) -> tuple[torch.Tensor, Reused]:
        """Fill one row with the KV of all tokens of a prompt; the logits of the last one, and what was done."""
        options = self._options(ids, documents)
        options.check(len(ids))
        fingerprint = prefixes.keys.fingerprint
        if self._pass[0] != fingerprint:
            self._pass = self._ask_gate(fingerprint)
        run = BlendRun(
            self.model,
            prefixes,
            place,
            ids,
            policy=self.policy,
            gate=self._pass[1],
            control=self._control,
            costs=self._costs,
            pipelined=self._pipelined,
            min_quality=self._min_quality,
        )
        return run.fill(options), run.state

    def _options(self, ids: Ids, documents: Sequence[Document]) -> PlanOptions:
        """How to plan a prompt. Raises ConfigError."""
        begins = ids[: len(self.preamble)].tolist() == self.preamble
        return PlanOptions(
            documents=tuple(documents),
            preamble_tokens=len(self.preamble) if begins else 0,
            scan=self._scan,
            context_tokens=self.model.config.max_position_embeddings,
            recompute_share=self._pass[1].ratio,
            rates=self._costs.rates() if self._load_policy == "cost" else CostRates(),
        )

    def _store_new(self, state: Reused, ids: Ids, documents: Sequence[Document]) -> None:
        if self._store_documents:
            for own in documents:
                tokens = ids[own.start : own.stop] if own.tokens is None else own.tokens
                state.documents = state.documents.plus(self.store_document(tokens))

    def _ask_gate(self, fingerprint: bytes) -> tuple[bytes, BlendPass]:
        """The fingerprint of the keys, and what the gate says of the model as it is now."""
        measured = identify(self.model)[1] if self._share else fingerprint  # shared keys name a checkpoint, not a model
        return fingerprint, BlendPass(self._blend_gates, measured, self.policy, self._blend_limits)

    def _blend_command(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return command(self.policy, self.model.name_or_path or "", dtype, self._codec)
