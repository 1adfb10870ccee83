"""How far apart transformers and vLLM are on one checkpoint, and what each makes of KV that the other has stored.

    python tests/engines/vllm_shared.py [--dtype float32|bfloat16] [--model DIRECTORY]

Run it where vLLM is installed; prints a JSON object. Prompts are Python's own sources, in the model's tokens.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import msgspec

from kvstore import connect
from kvstore.bench.daemon import Daemon
from tests.engines.vllm_samples import ROOT, flush, start_engine

TEXT = ROOT / "tests" / "models" / "text"
CHUNK_TOKENS = 64
NEW_TOKENS = 24
PROMPTS = 8
PROMPT_TOKENS = 300
SETTINGS: dict[str, Any] = {
    "chunk_tokens": CHUNK_TOKENS,
    "share_between_engines": True,
    "load_policy": "always",
    "lookup_deadline_ms": 30_000.0,
    "load_deadline_ms": 30_000.0,
    "store_deadline_ms": 30_000.0,
}


class Comparison(msgspec.Struct):
    """What two engines make of the same prompts.

    Differences of K and V are the largest of any number, relative to the largest of its layer. `kl` is the largest
    divergence of next-token distributions of a prompt behind the other engine's KV from those behind its own, in nats.
    Tokens that agree are counted up to the first that differs, in each greedy answer.
    """

    dtype: str
    prompts: int
    cached_in_vllm: list[int]
    cached_in_transformers: list[int]
    unshared: int
    key_difference: float = 0.0
    value_difference: float = 0.0
    kl: float = 0.0
    same_first_tokens: int = 0
    engines_agree: float = 0.0
    """Of vLLM's tokens with KV of its own with those of transformers."""
    vllm_agrees: float = 0.0
    """Of vLLM's tokens behind KV of transformers with those behind its own."""
    transformers_agree: float = 0.0
    """Of the tokens of transformers behind KV of vLLM with those behind its own."""


def prompts(model: Path) -> list[list[int]]:
    """Twice PROMPTS pieces of text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(inspect.getsource(argparse) + inspect.getsource(textwrap))["input_ids"]
    assert len(ids) >= 2 * PROMPTS * PROMPT_TOKENS
    return [ids[at * PROMPT_TOKENS : (at + 1) * PROMPT_TOKENS] for at in range(2 * PROMPTS)]


def compare(model: Path, dtype: str, log: Path) -> Comparison:
    """Have each engine write for the other."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvstore.connectors.transformers import TransformersConnector

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    texts = prompts(model)
    for_vllm, for_transformers = texts[:PROMPTS], texts[PROMPTS:]
    with tempfile.TemporaryDirectory() as directory, Daemon(Path(directory), dram="512MiB") as daemon:
        with daemon.start() as client:
            options: dict[str, Any] = {"chunk_tokens": CHUNK_TOKENS, "load_policy": "always"}
            ours = TransformersConnector(loaded, client, share_between_engines=True, **options)
            own = [_greedy(loaded, ids) for ids in texts]
            for ids in for_vllm:
                ours.prefill(torch.tensor([ids]))
        with start_engine(model, {"url": daemon.url, **SETTINGS}, log, dtype=dtype, block_size=32) as engine:
            read = engine.run(for_vllm, NEW_TOKENS)
            alone = engine.run(for_vllm, NEW_TOKENS, salt="nobody else")
            written = engine.run(for_transformers, NEW_TOKENS)
            flush(daemon)
        with connect(daemon.url) as client:
            apart = TransformersConnector(loaded, client, **options)
            unshared = sum(apart.prefill(torch.tensor([ids]))[2].reused_tokens for ids in for_transformers)
            ours = TransformersConnector(loaded, client, share_between_engines=True, **options)
            comparison = Comparison(dtype, PROMPTS, read.cached, [], unshared)
            behind = []
            for ids in for_transformers:
                _behind(loaded, ours, ids, comparison)
                behind.append(ours.generate(torch.tensor([ids]), **_SAMPLING)[0][0, len(ids) :].tolist())
    comparison.engines_agree = _agreement(alone.tokens + written.tokens, own)
    comparison.vllm_agrees = _agreement(read.tokens, alone.tokens)
    comparison.transformers_agree = _agreement(behind, own[PROMPTS:])
    return comparison


_SAMPLING: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _greedy(model: Any, ids: list[int]) -> list[int]:
    import torch

    tokens: list[int] = model.generate(torch.tensor([ids]), **_SAMPLING)[0, len(ids) :].tolist()
    return tokens


def _behind(model: Any, connector: Any, ids: list[int], comparison: Comparison) -> None:
    """Compare a prompt behind KV of the other engine with the same behind the model's own."""
    import torch

    with torch.no_grad():
        own = model(torch.tensor([ids]), use_cache=True)
    cache, logits, report = connector.prefill(torch.tensor([ids]))
    comparison.cached_in_transformers.append(report.reused_tokens)
    reused = slice(0, report.reused_tokens)
    for ours, theirs in zip(own.past_key_values.layers, cache.layers, strict=True):
        for name, field in (("keys", "key_difference"), ("values", "value_difference")):
            one, other = (getattr(layer, name)[0, :, reused].double() for layer in (ours, theirs))
            if one.numel():
                difference = float((one - other).abs().max() / one.abs().max())
                setattr(comparison, field, max(getattr(comparison, field), difference))
    expected = own.logits[:, -1].double().log_softmax(-1)
    got = logits.double().log_softmax(-1)
    comparison.kl = max(comparison.kl, float((expected.exp() * (expected - got)).sum()))
    comparison.same_first_tokens += int(expected.argmax() == got.argmax())


def _agreement(some: list[list[int]], others: list[list[int]]) -> float:
    """Share of tokens up to the first that differs."""
    same = 0
    for one, other in zip(some, others, strict=True):
        same += next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
    return same / sum(map(len, some))


def main() -> None:
    """Compare, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", type=Path, default=TEXT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(msgspec.to_builtins(compare(given.model, given.dtype, Path(directory) / "log")), indent=2))


if __name__ == "__main__":
    main()
