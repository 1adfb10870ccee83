"""Plans of a long prompt made of known documents: scanning it, planning it in the process and through a daemon.

The prompt is documents of two pieces, each behind a few tokens of its own, and an index of thousands of others is
scanned for. `scan_vs_keys` compares the scan with making the prompt's chain keys, which every lookup has to do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.batching import plan_batch
from kvstore.bench.timing import median, paired, seconds
from kvstore.client import Client
from kvstore.compose import open_store
from kvstore.config import Config, TierConfig
from kvstore.connect import connect
from kvstore.embedded import EmbeddedClient
from kvstore.keys import KeyScheme
from kvstore.sidecar import describe, scope_of
from kvstore.span_plan import PlanOptions
from kvstore.spans import cut
from kvstore.testing.chunks import FINGERPRINT
from kvstore.testing.client_plan import put_document
from kvstore.testing.serving import ServerThread

VOCABULARY = 128_000
DOCUMENT_TOKENS = 512
BETWEEN_TOKENS = 32
PREAMBLE = tuple(range(32))
ROUNDS = 31


def measure(directory: Path, quick: bool = False) -> dict[str, float]:
    """Milliseconds of each."""
    generator = np.random.default_rng(1)
    known, prompt_tokens, rounds = (50, 4_096, 3) if quick else (5_000, 32_768, ROUNDS)
    documents = [_tokens(generator, DOCUMENT_TOKENS) for _ in range(known)]
    keys = KeyScheme(FINGERPRINT)
    parts = [np.array(PREAMBLE, np.uint32)]
    used = documents[: (prompt_tokens - len(PREAMBLE)) // (DOCUMENT_TOKENS + BETWEEN_TOKENS)]
    for document in used:
        parts += [_tokens(generator, BETWEEN_TOKENS), document]
    prompt = np.concatenate([*parts, _tokens(generator, BETWEEN_TOKENS)])
    options = PlanOptions(preamble_tokens=len(PREAMBLE))
    store = open_store(Config(tiers={"dram": TierConfig(capacity="64MiB")}))
    client = EmbeddedClient(store)
    with ServerThread(store) as server, connect(server.unix_url) as remote:
        for document in used:
            put_document(client, document.tolist(), PREAMBLE, keys=keys)
        for planner in (client.planner, server.server.daemon.planner):
            for document in documents:
                for piece in cut(keys, document, preamble=PREAMBLE):
                    planner.index.add(describe(keys, piece, document, PREAMBLE))
        index = client.planner.index
        scope = scope_of(keys)
        scan, _, speed = paired(lambda: index.find(scope, prompt), lambda: keys.chain(prompt), rounds=rounds)

        def plan(of: Client) -> None:
            if of.plan(prompt, keys, options).reused_tokens != len(used) * DOCUMENT_TOKENS:
                raise AssertionError("the plan reuses something else than the documents")

        metrics = {
            "engine.spans.scan_ms": scan * 1e3,
            "engine.spans.scan_vs_keys": 1 / speed,
            "engine.spans.plan_ms": median([seconds(lambda: plan(client)) for _ in range(rounds)]) * 1e3,
            "engine.spans.plan_unix_ms": median([seconds(lambda: plan(remote)) for _ in range(rounds)]) * 1e3,
        }
    return metrics | _batch(generator, keys, 8 if quick else 256)


def _batch(generator: np.random.Generator, keys: KeyScheme, count: int) -> dict[str, float]:
    """The order of prompts that share one of sixteen beginnings, and how much less it computes than the order given."""
    beginnings = [_tokens(generator, 2_048) for _ in range(16)]
    prompts = [np.concatenate([beginnings[number % 16], _tokens(generator, 512)]) for number in range(count)]
    took = median([seconds(lambda: plan_batch(prompts, keys)) for _ in range(3)])
    # An engine that keeps one prompt computes everything in the order given, because neighbours share nothing.
    plan = plan_batch(prompts, keys, cache_tokens=2_560)
    return {
        "engine.spans.batch_ms": took * 1e3,
        "engine.spans.batch_computed_share": plan.computed_tokens / plan.tokens,
    }


def _tokens(generator: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    return generator.integers(0, VOCABULARY, count).astype(np.uint32)
