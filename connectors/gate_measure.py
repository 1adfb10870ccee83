"""One trial: prefill a context, code and decode its KV, and run what follows on both.

The full and the decoded KV lie in rooms of the same shape and the model runs through the same kernels, so a codec that
is exact changes nothing at all. One context, its containers and two rooms are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codec import Codec
from kvstore.connectors.gate_attention import AttentionCall, recorded_attention, squared_error
from kvstore.connectors.gate_tally import Tally
from kvstore.connectors.gate_trials import Trial
from kvstore.connectors.torch_kv import TorchKV
from kvstore.container import ChunkMeta, Header, parse
from kvstore.keys import KeyScheme
from kvstore.spec import KVSpec


class Measurement:
    """Measures codecs on one model, trial by trial.

    Args:
        model: accepted by `hf_spec.check_model`.
        spec: its geometry.
        fingerprint: its fingerprint.
        chunk_tokens: tokens of a chunk; the last of a context may have fewer.
    """

    def __init__(self, model: PreTrainedModel, spec: KVSpec, fingerprint: bytes, chunk_tokens: int) -> None:
        self._model = model
        self._spec = spec
        self._fingerprint = fingerprint
        self._chunk_tokens = chunk_tokens

    @torch.no_grad()
    def run(self, trial: Trial, codecs: Sequence[Codec], tallies: Mapping[tuple[int, int], Tally]) -> None:
        """Add one trial to the tallies, which are by (index of the codec, level).

        Raises:
            CodecError: a codec cannot serve the model or encode its KV.
        """
        capacity = trial.context_tokens + trial.tokens.shape[1]
        full = TorchKV.allocate(self._spec, 1, capacity, self._model.device)
        context = trial.context.to(self._model.device)
        self._model.base_model(context, past_key_values=full.cache(0), use_cache=True)
        with recorded_attention(self._model) as calls:
            logits = self._logits(trial, full)
        decoded = TorchKV.allocate(self._spec, 1, capacity, self._model.device)
        for index, codec in enumerate(codecs):
            containers = self._encode(codec, full, trial)
            for level in (own for at, own in tallies if at == index):
                tally = tallies[index, level]
                tally.coded_bytes += sum(prefix_bytes(header, level) for header, _ in containers)
                tally.elements += self._spec.chunk_bytes(trial.context_tokens) // self._spec.itemsize
                self._decode(codec, containers, level, decoded)
                self._compare(trial, full, decoded, calls, tally)
                tally.add_logits(trial, logits, self._logits(trial, decoded))

    def _logits(self, trial: Trial, room: TorchKV) -> torch.Tensor:
        """Logits at the scored tokens, (n, vocabulary), behind the context whose KV is in the room."""
        device = self._model.device
        mask = None
        if trial.visible is not None:
            mask = torch.zeros(trial.visible.shape, dtype=self._model.dtype)
            mask = mask.masked_fill(~trial.visible, torch.finfo(self._model.dtype).min).to(device)
        positions = None if trial.positions is None else trial.positions.to(device)
        answer = self._model(
            trial.tokens.to(device),
            past_key_values=room.cache(trial.context_tokens),
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
        )
        logits: torch.Tensor = answer.logits[0, trial.scored.to(device)]
        return logits

    def _encode(self, codec: Codec, full: TorchKV, trial: Trial) -> list[tuple[Header, bytes]]:
        """The containers of the context's chunks, with their headers."""
        ids = trial.context[0].numpy()
        out = []
        parent = KeyScheme(self._fingerprint, chunk_tokens=1).content(ids)  # names the trial, so that chunks differ
        for start in range(0, trial.context_tokens, self._chunk_tokens):
            tokens = min(self._chunk_tokens, trial.context_tokens - start)
            meta = ChunkMeta(
                fingerprint=self._fingerprint,
                key=KeyScheme(self._fingerprint, chunk_tokens=tokens).chain(ids[start : start + tokens], parent)[0],
                spec=self._spec,
                tokens=tokens,
                first_position=start,
            )
            buffer = bytearray(encoded_bytes_max(codec, self._spec, tokens))
            nbytes = encode_chunk(codec, meta, full.readable(start, start + tokens), memoryview(buffer))
            data = bytes(memoryview(buffer)[:nbytes])
            out.append((parse(memoryview(data)), data))
        return out

    def _decode(self, codec: Codec, containers: list[tuple[Header, bytes]], level: int, room: TorchKV) -> None:
        """Fill the context's part of a room from the chunks, up to a level."""
        for header, data in containers:
            start, stop = header.meta.first_position, header.meta.first_position + header.meta.tokens
            decode_chunk(memoryview(data), room.writable(start, stop), lambda *_: codec, level_max=level)
            room.commit(start, stop)

    def _compare(
        self, trial: Trial, full: TorchKV, decoded: TorchKV, calls: Sequence[AttentionCall], tally: Tally
    ) -> None:
        """Errors of K, V and attention outputs; the tokens behind the context keep their full K and V."""
        stop = trial.context_tokens
        for layer, call in enumerate(calls):
            for error, original, other in zip(
                (tally.key_errors[layer], tally.value_errors[layer]),
                full.layers[layer],
                decoded.layers[layer],
                strict=True,
            ):
                error.add(squared_error(original[:, :, :stop], other[:, :, :stop]))
                other[:, :, stop:] = original[:, :, stop:]
            tally.attention_errors[layer].add(call.squared_error(*decoded.layers[layer]))


def levels_of(codec: Codec, spec: KVSpec, chunk_tokens: int) -> int:
    """Quality levels that a codec gives a chunk. Raises CodecError if it cannot serve the spec."""
    return 1 + max(plan.level for plan in codec.plan(spec, chunk_tokens))


def prefix_bytes(header: Header, level: int) -> int:
    """Bytes of a container's shortest prefix that has a level whole, header and padding included."""
    return max((s.offset + s.length for s in header.segments if s.level <= level), default=header.header_bytes)
