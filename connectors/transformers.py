"""The transformers connector: `prefill` and `generate` that load the KV of a known prefix and compute only the rest.

    connector = TransformersConnector(model, kvstore.connect("embedded:/var/lib/kvstore"))
    sequences, reports = connector.generate(input_ids, max_new_tokens=100)

What it promises is in `kvstore.connector`; what it refuses, and why, in `kvstore.connectors.hf_spec` and
docs/transformers.md. Not safe for several threads at once: give each its own connector; they may share the client.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from transformers import Cache, PreTrainedModel

from kvstore import gate, gate_records
from kvstore.client import Client
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connector import Loaded, ReuseReport, Stored
from kvstore.connectors.hf_generate import HEADROOM_TOKENS, GenerateSettings, Ids, one_prompt, prompt_rows, run_generate
from kvstore.connectors.hf_shared import identify_shared
from kvstore.connectors.model_identity import identify
from kvstore.connectors.prefix import (
    LOAD_DEADLINE_MS_DEFAULT,
    STORE_DEADLINE_MS_DEFAULT,
    LoadPolicy,
    PrefixStore,
    replaceable,
)
from kvstore.connectors.torch_kv import TorchKV
from kvstore.connectors.weights import weights_signature
from kvstore.cost import CostModel
from kvstore.errors import CodecError, ContainerError
from kvstore.keys import DEFAULT_CHUNK_TOKENS, ROOT, KeyScheme


class _Turn(msgspec.Struct):
    """One prompt of a batch: what was reused, and what has been done for it before generation starts."""

    ids: Ids
    loaded: Loaded
    reused: int
    in_store: int
    stored: Stored
    replace: bool = False
    compute_ms: float = 0.0


class TransformersConnector:
    """A model and a store: prompts whose beginning is known are not computed again.

    Args:
        model: a causal language model of a tested family (`hf_spec.FAMILIES`), in eval mode, on one device.
        client: the store, from `kvstore.connect`.
        chunk_tokens: tokens of a chunk; two connectors share KV only if it is the same.
        codec: id of a codec, or the codec itself; a lossy one needs a pass of the quality gate for this very model.
            None for what the store asks for if that is exact, else `lossless`.
        durable: whether storing waits until the chunks would survive kill -9.
        load_deadline_ms: longest wait for lookup and load of one prompt; what is there by then is used.
        store_deadline_ms: longest wait for storing one prompt's chunks.
        salt: separates tenants; two salts never share KV.
        limits: what lossy codecs may do to the model; None for no lossy KV at all, or, with a lossy `codec`,
            `gate.STANDARD`. Connectors with limits and without share no KV.
        gates: records of the quality gate; None for those in the directories of KVSTORE_PROFILES.
        min_quality: chunks stored in a lower quality (`kvstore.client.Client`) are computed again instead.
        decode_in_store: let the store (the daemon) decode the chunks instead of this process.
        load_policy: "cost" computes again what would take longer to load, by what loads and prefills took so far;
            "always" loads whatever there is.
        share_between_engines: share KV with other engines that run the same checkpoint and have been told the same.
            They round differently, so a model's KV is then exact up to what docs/engines.md measures.

    Raises:
        UnsupportedModelError: the model cannot be served exactly; names what and why.
        ConfigError, CodecError, SpecError: another argument is wrong, or a lossy codec has no pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: Client,
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        codec: str | Codec | None = None,
        durable: bool = False,
        load_deadline_ms: float = LOAD_DEADLINE_MS_DEFAULT,
        store_deadline_ms: float = STORE_DEADLINE_MS_DEFAULT,
        salt: bytes = b"",
        limits: gate.Limits | None = None,
        gates: Sequence[gate.GateRecord] | None = None,
        min_quality: int = 0,
        decode_in_store: bool = False,
        load_policy: LoadPolicy = "cost",
        share_between_engines: bool = False,
    ) -> None:
        self.model = model
        self.client = client
        self._chunk_tokens = chunk_tokens
        self._codec = codec if isinstance(codec, Codec) else _codec(codec or _wanted(client))
        self._durable = durable
        self._load_deadline_ms = load_deadline_ms
        self._store_deadline_ms = store_deadline_ms
        self._salt = salt
        self._min_quality = min_quality
        self._decode_in_store = decode_in_store
        self._load_policy = load_policy
        self._share = share_between_engines
        self._costs = CostModel()
        self._limits = gate.STANDARD if limits is None and not self._codec.exact else limits
        self._gates = gate_records.load_all() if gates is None and self._limits is not None else gates or ()
        self._prefixes = self._open()
        self._signature = weights_signature(model)

    @property
    def fingerprint(self) -> bytes:
        """32-byte name of everything that changes the numbers of this model's KV."""
        return self._current().keys.fingerprint

    @torch.no_grad()
    def prefill(
        self, input_ids: torch.Tensor, *, headroom: int = HEADROOM_TOKENS
    ) -> tuple[Cache, torch.Tensor, ReuseReport]:
        """The cache of a whole prompt, the logits of its last token (1, vocabulary), and what the store did.

        Go on with `model(next_token, past_key_values=cache)`; the cache has room for `headroom` more tokens and grows
        by copying after that.

        Args:
            input_ids: one prompt, (1, tokens).
            headroom: tokens expected to follow.

        Raises:
            SpecError: `input_ids` is not one prompt of at least one token.
            UnsupportedModelError: the model has been changed into one that cannot be served.
        """
        ids = one_prompt(input_ids)
        prefixes = self._current()
        memory = TorchKV.allocate(prefixes.spec, 1, len(ids) + headroom, self.model.device)
        turn = self._load(prefixes, ids, memory)
        cache = memory.cache(turn.reused)
        started = time.perf_counter()
        logits = self.model(
            input_ids[:, turn.reused :].to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        self._computed(turn, started, len(turn.ids))
        turn.stored = prefixes.store(prefixes.chain(turn.ids), turn.in_store, memory, replace=turn.replace)
        return cache, logits, _report(turn)

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, list[ReuseReport]]:
        """What `model.generate` answers for the same arguments, and a report for each prompt.

        Chunks that become full while generating are stored too, so that the next turn of a conversation finds them.

        Args:
            input_ids: prompts, (rows, tokens), shorter ones padded on the left.
            attention_mask: 1 for tokens, 0 for padding, same shape; without one it is inferred as transformers does.
            kwargs: settings of `model.generate`.

        Raises:
            SpecError: the mask is not left padding, or a prompt is empty.
            UnsupportedModelError: a setting that cannot be served, by name; or the model has become one.
        """
        given = GenerateSettings(kwargs, self.model.generation_config)
        given.check()
        mask = given.infer_mask(input_ids) if attention_mask is None else attention_mask
        prompts = prompt_rows(input_ids, mask)
        prefixes = self._current()
        width = input_ids.shape[1]
        capacity = width + given.headroom_tokens(width)
        memory = TorchKV.allocate(prefixes.spec, len(prompts), capacity, self.model.device)
        alone = len(prompts) == 1 and len(prompts[0]) == width
        if alone:  # generate itself computes what was not loaded
            turns = [self._load(prefixes, prompts[0], memory)]
            cache = memory.cache(turns[0].reused)
        else:
            turns = [self._fill_row(prefixes, ids, memory, row, width) for row, ids in enumerate(prompts)]
            cache = memory.cache(width - 1)
        done = run_generate(self.model, input_ids, mask, cache, kwargs)
        final = TorchKV.of(prefixes.spec, cache)
        for row, (turn, sequence) in enumerate(zip(turns, done.sequences.cpu().numpy(), strict=True)):
            padding = width - len(turn.ids)
            if alone:
                self._computed(turn, done.started, len(turn.ids), done.first_step)
            else:
                turn.compute_ms += (done.first_step - done.started) * 1e3
            chain = prefixes.chain(given.worth_storing(sequence[padding:], len(turn.ids)))
            stored = prefixes.store(chain, turn.in_store, final.row(row, padding), replace=turn.replace)
            turn.stored = turn.stored.plus(stored)
        return done.output, [_report(turn) for turn in turns]

    def _load(self, prefixes: PrefixStore, ids: Ids, memory: TorchKV) -> _Turn:
        """Load what is known of a prompt, at most all but its last token, whose logits are wanted."""
        loaded = prefixes.load(prefixes.chain(ids), memory, len(ids) - 1)
        reused = min(loaded.chunks * self._chunk_tokens, len(ids) - 1)
        return _Turn(
            ids=ids,
            loaded=loaded,
            reused=reused,
            in_store=loaded.chunks,
            stored=Stored(),
            replace=replaceable(loaded),
        )

    def _computed(self, turn: _Turn, started: float, tokens: int, ended: float | None = None) -> None:
        """Note that the prompt has been computed up to `tokens`, from what was reused on; times of time.perf_counter.

        Without `ended` it ends when the device has done what it was asked to.
        """
        if ended is None:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            ended = time.perf_counter()
        turn.compute_ms = (ended - started) * 1e3
        if tokens > turn.reused:
            self._costs.observe_prefill(tokens=tokens - turn.reused, context=turn.reused, ms=turn.compute_ms)

    def _fill_row(self, prefixes: PrefixStore, ids: Ids, memory: TorchKV, row: int, width: int) -> _Turn:
        """Fill one row of a batch, padded on the left to `width`, with the KV of all tokens but the prompt's last.

        Stores the full chunks at once, so that the rows after it find a beginning they share.
        """
        padding = width - len(ids)
        memory.clear(row, padding)
        place = memory.row(row, padding)
        turn = self._load(prefixes, ids, place)
        started = time.perf_counter()
        if turn.reused < len(ids) - 1:
            rest = torch.from_numpy(ids[turn.reused : -1]).to(self.model.device)
            self.model.base_model(rest[None], past_key_values=place.cache(turn.reused), use_cache=True)
        self._computed(turn, started, len(ids) - 1)
        chain = prefixes.chain(ids[:-1])
        turn.stored = prefixes.store(chain, turn.in_store, place, replace=turn.replace)
        turn.in_store = max(turn.in_store, len(chain))
        turn.replace = False
        return turn

    def _current(self) -> PrefixStore:
        """The prefixes of the model as it is now: changed weights are another model."""
        signature = weights_signature(self.model)
        if signature != self._signature or self.model.training or torch.is_autocast_enabled(self.model.device.type):
            self._prefixes = self._open()
            self._signature = signature
        return self._prefixes

    def _open(self) -> PrefixStore:
        spec, name = identify_shared(self.model) if self._share else identify(self.model)
        return PrefixStore(
            self.client,
            spec,
            KeyScheme(
                name,
                chunk_tokens=self._chunk_tokens,
                salt=self._salt,
                extras={} if self._limits is None else {"lossy": 1},  # KV computed behind lossy KV is not exact either
            ),
            self._codec,
            durable=self._durable,
            load_deadline_ms=self._load_deadline_ms,
            store_deadline_ms=self._store_deadline_ms,
            limits=self._limits,
            gates=self._gates,
            gate_command=self._gate_command,
            min_quality=self._min_quality,
            decode_in_store=self._decode_in_store,
            load_policy=self._load_policy,
            costs=self._costs,
        )

    def _gate_command(self, codec: Codec) -> str:
        """The command line that would measure a codec on this model, as it is loaded here."""
        options = ["--dtype", str(self.model.dtype).removeprefix("torch.")]
        if self._chunk_tokens != DEFAULT_CHUNK_TOKENS:
            options += ["--chunk-tokens", str(self._chunk_tokens)]
        return gate.command(codec, self.model.name_or_path or "MODEL", options)


def _wanted(client: Client) -> str:
    """The codec to put chunks in when the caller named none: lossy ones are for those who ask for them."""
    asked = client.put_codec
    return asked if asked and registry.is_exact(asked) else "lossless"


def _codec(codec_id: str) -> Codec:
    try:
        return registry.get(codec_id, ROOT)
    except ContainerError as error:
        raise CodecError(f"codec: {error.detail}") from error


def _report(turn: _Turn) -> ReuseReport:
    return ReuseReport.of(
        prompt_tokens=len(turn.ids),
        reused_tokens=turn.reused,
        loaded=turn.loaded,
        stored=turn.stored,
        compute_ms=turn.compute_ms,
    )
