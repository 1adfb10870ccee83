"""Runs LMCache's own CacheGen on arrays of a file; started by `kvstore.bench.codec_lmcache` in LMCache's environment.

    python lmcache_worker.py INPUT.npz OUTPUT.npz

INPUT: `kv` fp32 (chunks, layers, 2, tokens, heads, dim), which is made bfloat16, as engines cache it. OUTPUT: `kv`
likewise, `nbytes` (chunks,), `encode_seconds` and `decode_seconds`, medians. It uses the functions that LMCache's
serializer and deserializer call, with the bins of their default for a model that its table does not name, on its CPU
path; serializing itself needs an accelerator. The bytes are those of the tensors that LMCache stores; the pickle around
them is not counted.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from typing import Any

import numpy as np

ROUNDS = 3


def main(source: str, target: str) -> None:
    """Encode and decode every chunk of `source`; write `target`."""
    torch: Any = importlib.import_module("torch")
    encoder: Any = importlib.import_module("lmcache.storage_backend.serde.cachegen_encoder")
    decoder: Any = importlib.import_module("lmcache.storage_backend.serde.cachegen_decoder")
    basics: Any = importlib.import_module("lmcache.storage_backend.serde.cachegen_basics")
    chunks = torch.from_numpy(np.load(source)["kv"]).to(torch.bfloat16)
    _, layers, _, tokens, heads, dim = chunks.shape
    key_bins = torch.tensor([32.0 if layer < 10 else 16.0 for layer in range(layers)])
    value_bins = torch.tensor([32.0 if layer < 2 else 16.0 for layer in range(layers)])
    buffer = torch.zeros((tokens, 2 * layers * heads * dim), dtype=torch.uint8)
    out, sizes, encode_seconds, decode_seconds = [], [], [], []
    for chunk in chunks:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            coded = encoder.encode_function(chunk, None, key_bins, value_bins, tokens)
            encoded = time.perf_counter()
            parts = decoder.decode_function_gpu(coded.cdf, coded.data_chunks, layers, tokens, buffer)
            scales = (coded.max_tensors_key, coded.max_tensors_value)
            values = [
                decoder.do_dequantize(part, bins, scale)
                for part, bins, scale in zip(parts, (key_bins, value_bins), scales, strict=True)
            ]
            decode_seconds.append(time.perf_counter() - encoded)
            encode_seconds.append(encoded - started)
        stored = [coded.cdf, *scales]
        stored += [tensor for part in coded.data_chunks for tensor in (part.bytestream, part.bytestream_lengths)]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in stored))
        blob = torch.stack(values, dim=1).reshape(layers, 2, tokens, heads, dim)
        out.append(blob.to(torch.bfloat16).float().numpy())
    assert tokens <= basics.CACHEGEN_GPU_MAX_TOKENS_PER_CHUNK, "chunks of one stream are what is measured"
    np.savez(
        target,
        kv=np.stack(out),
        nbytes=np.asarray(sizes),
        encode_seconds=statistics.median(encode_seconds),
        decode_seconds=statistics.median(decode_seconds),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
