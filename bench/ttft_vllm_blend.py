"""Time to first token of a blended request in vLLM on the CPU, with a random-weight model of Qwen2.5-0.5B geometry.

A prompt has eight documents of 512 tokens in an order that no other prompt has, behind a beginning of its own, so
nothing of it is a known prefix. One engine has no connector and computes it whole. The other puts it together from the
documents, which it has stored before, and computes 15 % of them again. Random weights say nothing of quality.
"""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

from kvstore.bench.cli import BenchError
from kvstore.bench.daemon import Daemon
from kvstore.bench.timing import median
from kvstore.bench.ttft import half_billion_model
from kvstore.bench.vllm_engine import Engine, Outcome
from kvstore.connect import connect

RATIO = 0.15
PREAMBLE_TOKENS = 16
OWN_TOKENS = 16
QUESTION_TOKENS = 32
SAVE_SECONDS_MAX = 120.0
WAIT_MS = 60_000.0
SEED = 20_260_000


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """`ttft.vllm.blend_*` metrics: seconds, ratios to computing all, shares of the documents computed again.

    Raises:
        BenchError: this interpreter has no vLLM, or a request is not blended.
    """
    if importlib.util.find_spec("vllm") is None:
        raise BenchError("vLLM is not installed here; run this with the interpreter of an environment that has it")
    documents, tokens = (4, 128) if quick else (8, 512)
    print(f"ttft: vLLM, blended from {documents} documents of {tokens} tokens")
    model = directory / "blended-model"
    half_billion_model(layers=2 if quick else 24).save_pretrained(model)
    llm: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 5120,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
    }
    environment = {"OMP_WAIT_POLICY": "passive"}
    log = directory / "vllm-blend.log"
    prompts = _Prompts(documents, tokens)
    with Daemon(directory, dram="1GiB", nvme="2GiB") as daemon:
        daemon.start().close()
        deadlines = dict.fromkeys(("lookup_deadline_ms", "load_deadline_ms", "store_deadline_ms"), WAIT_MS)
        blend = {"options": {"ratio": RATIO}, "ungated": True, "deadline_ms": WAIT_MS}
        settings = {"url": daemon.url, "chunk_tokens": tokens, "durable": True, "blend": blend, **deadlines}
        with (
            Engine(model, None, log, environment=environment, **llm) as alone,
            Engine(model, settings, log, environment=environment, **llm) as blended,
        ):
            _store(daemon, blended, prompts)
            return _measure(daemon, alone, blended, prompts, rounds=1 if quick else 2)


class _Prompts:
    """Documents behind a preamble, and prompts that are made of them."""

    def __init__(self, documents: int, tokens: int) -> None:
        self._dice = random.Random(SEED)
        self.preamble = self._draw(PREAMBLE_TOKENS)
        self.documents = [self._draw(tokens) for _ in range(documents)]
        self.wish = {"kvstore": {"store_document": {"preamble_tokens": PREAMBLE_TOKENS}}}

    def make(self) -> tuple[list[int], dict[str, Any]]:
        """A prompt, and the wish to have it blended."""
        prompt, places = self.preamble + self._draw(OWN_TOKENS), []
        for document in self._dice.sample(self.documents, len(self.documents)):
            places.append([len(prompt), len(prompt) + len(document)])
            prompt = prompt + document
        blend = {"preamble_tokens": PREAMBLE_TOKENS, "documents": places}
        return prompt + self._draw(QUESTION_TOKENS), {"kvstore": {"blend": blend}}

    def _draw(self, count: int) -> list[int]:
        return [self._dice.randrange(150_000) for _ in range(count)]


def _store(daemon: Daemon, engine: Engine, prompts: _Prompts) -> None:
    """Have the documents stored. Raises BenchError if that takes too long."""
    until = time.monotonic() + SAVE_SECONDS_MAX
    asked = [prompts.preamble + document for document in prompts.documents]
    stored, wanted = 0, 2 * len(asked)  # with their side-cars
    with connect(daemon.url) as client:
        while stored < wanted:  # an engine stores nothing before it has read its weights' files
            if time.monotonic() > until:
                raise BenchError(f"vLLM stored {stored} of {wanted} objects in {SAVE_SECONDS_MAX:.0f} s")
            engine.run(asked, 1, transfer=[prompts.wish] * len(asked))
            time.sleep(1.0)
            stored = client.stats()["tiers"]["dram"]["usage"]["entries"]
        client.flush()


def _measure(daemon: Daemon, alone: Engine, blended: Engine, prompts: _Prompts, *, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"cold": [], "dram": [], "nvme": []}
    shares, computing, cpu_ratios = [], [], []
    for round_index in range(rounds + 1):  # the first is nobody's: what is done for the first time takes longer
        prompt, wish = prompts.make()
        runs = {"cold": alone.run([prompt], 1), "dram": blended.run([prompt], 1, transfer=[wish])}
        daemon.kill()
        daemon.start().close()
        blended.run([prompts.preamble], 1)  # so that it has connected again
        runs["nvme"] = blended.run([prompt], 1, transfer=[wish])
        said = [_said(runs[name]) for name in ("dram", "nvme")]
        print("  " + ", ".join(f"{name} {run.seconds:.3f} s" for name, run in runs.items()), said[0])
        if round_index:
            for name, run in runs.items():
                times[name].append(run.seconds)
            cpu_ratios.append(runs["dram"].cpu_seconds / runs["cold"].cpu_seconds)
            shares += [own["layer_share"] for own in said]
            computing += [own["compute_ms"] / 1e3 for own in said]
    metrics = {f"ttft.vllm.blend_{name}_seconds": median(values) for name, values in times.items()}
    for name in ("dram", "nvme"):
        ratios = [taken / cold for taken, cold in zip(times[name], times["cold"], strict=True)]
        metrics[f"ttft.vllm.blend_{name}_vs_cold"] = median(ratios)
    return {
        **metrics,
        # Time on the processors does not depend on what share of them other processes take.
        "ttft.vllm.blend_dram_cpu_vs_cold": median(cpu_ratios),
        "ttft.vllm.blend_compute_seconds": median(computing),
        "ttft.vllm.blend_layer_share": median(shares),
    }


def _said(outcome: Outcome) -> dict[str, float]:
    """What the engine says of a blended request. Raises BenchError if it is not one."""
    (answer,) = outcome.transfer
    said = {} if answer is None else answer["kvstore"]
    if "blended" not in said:
        raise BenchError(f"vLLM did not blend: {said}")
    found: dict[str, float] = said["blended"]
    return found
