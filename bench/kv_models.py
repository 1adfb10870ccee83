"""KV of a real model run over text: what the rate and error of codecs are measured on where torch is installed."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstore.bench.kv_samples import CHUNK_TOKENS, QUERY_TOKENS, SampleChunk, Samples
from kvstore.connectors.gate_attention import recorded_attention
from kvstore.connectors.hf_spec import kv_spec
from kvstore.spec import KVArrays, KVSpec

CHUNKS_A_WINDOW = 2
WINDOW_TOKENS = CHUNK_TOKENS * CHUNKS_A_WINDOW + QUERY_TOKENS


def of_model(name: str, path: Path, *, windows: int, calibration_windows: int) -> Samples:
    """Samples of a model directory: of the language reference that every Python carries, or of random tokens.

    The first `windows` sequences of text are measured on, the ones behind them calibrate. A model whose tokenizer makes
    no text (that of a synthetic task) gets sequences of its own tokens, drawn with a seed.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)
    model = loaded.eval()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    spec = kv_spec(model)
    sequences = _sequences(tokenizer, model.config.vocab_size)
    measured = [next(sequences) for _ in range(windows)]
    calibrating = [next(sequences) for _ in range(calibration_windows)]
    return Samples(
        name,
        spec,
        [chunk for window in calibrating for chunk in _chunks(model, spec, window)],
        [chunk for window in measured for chunk in _chunks(model, spec, window)],
    )


def _sequences(tokenizer: Any, vocabulary: int) -> Iterator[torch.Tensor]:
    """Token ids, WINDOW_TOKENS each, text first and seeded random tokens behind it."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = WINDOW_TOKENS - len(start)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or ids.count(unknown) < len(ids) // 10:
        for at in range(0, len(ids) - size + 1, size):
            yield torch.tensor([*start, *ids[at : at + size]])
    random = np.random.default_rng(0)
    while True:
        yield torch.tensor([*start, *random.integers(0, vocabulary, size).tolist()])


def _chunks(model: Any, spec: KVSpec, window: torch.Tensor) -> Iterator[SampleChunk]:
    with torch.inference_mode(), recorded_attention(model) as calls:
        cache = model(input_ids=window[None], use_cache=True).past_key_values
    queries = np.stack([call.queries[0].float().numpy() for call in calls])
    for first in range(0, CHUNK_TOKENS * CHUNKS_A_WINDOW, CHUNK_TOKENS):
        stop = first + CHUNK_TOKENS
        arrays: KVArrays = []
        for layer in cache.layers:
            keys, values = (
                np.ascontiguousarray(part[0, :, first:stop].view(torch.uint16).numpy())
                for part in (layer.keys, layer.values)
            )
            arrays.append((keys, values))
        spec.check_arrays(arrays, CHUNK_TOKENS)
        yield SampleChunk(arrays, first, np.ascontiguousarray(queries[:, :, stop : stop + QUERY_TOKENS]))
