"""Time to first token of vLLM on the CPU with a random-weight model of Qwen2.5-0.5B geometry.

Two engines take turns on the same prompts. One has no connector and keeps prefixes itself: a new prompt is cold, the
same again comes out of its own cache, the upper bound. The other has the connector and keeps nothing itself: a new
prompt is a miss, the same again comes out of the daemon's memory, and after kill -9 and a restart out of its disk.
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
from kvstore.bench.vllm_engine import Engine
from kvstore.client import Client
from kvstore.connect import connect

CHUNK_TOKENS = 256
QUESTION_TOKENS = 32
NEW_TOKENS = 2
SAVE_SECONDS_MAX = 60.0
HOOK_ROUNDS = 300

Times = dict[str, list[float]]


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """`ttft.vllm.*` metrics; seconds, ratios to cold, and microseconds of a hook.

    Raises:
        BenchError: this interpreter has no vLLM.
    """
    if importlib.util.find_spec("vllm") is None:
        raise BenchError("vLLM is not installed here; run this with the interpreter of an environment that has it")
    model = directory / "model"
    half_billion_model(layers=2 if quick else 24).save_pretrained(model)
    lengths = {"": 512} if quick else {"": 2048, "_4k": 4096}
    llm: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 5120, "max_num_seqs": 4}
    environment = {"OMP_WAIT_POLICY": "passive"}
    metrics: dict[str, float] = {}
    log = directory / "vllm.log"
    with Daemon(directory, dram="1GiB", nvme="2GiB") as daemon:
        daemon.start().close()
        settings = {"url": daemon.url, "chunk_tokens": CHUNK_TOKENS}
        with (
            Engine(model, None, log, environment=environment, enable_prefix_caching=True, **llm) as alone,
            Engine(model, settings, log, environment=environment, enable_prefix_caching=False, **llm) as stored,
        ):
            _warm_up(alone, stored)
            for suffix, tokens in lengths.items():
                print(f"ttft: vLLM, prompt of {tokens} + {QUESTION_TOKENS} tokens")
                metrics |= _measure_length(daemon, alone, stored, tokens, suffix, rounds=1 if quick else 3)
            hooks = stored.idle_hooks_us(HOOK_ROUNDS)
    slowest = max(hooks, key=hooks.__getitem__)
    print(f"  idle hooks: {sum(hooks.values()):.0f} us a step, the slowest is {slowest}")
    return {**metrics, "ttft.vllm.idle_hook_us_max": hooks[slowest], "ttft.vllm.idle_step_us": sum(hooks.values())}


def _measure_length(
    daemon: Daemon, alone: Engine, stored: Engine, tokens: int, suffix: str, *, rounds: int
) -> dict[str, float]:
    times: Times = {name: [] for name in ("cold", "own_cache", "miss", "warm_dram", "warm_nvme")}
    cpu_ratios = []
    equal, reused = True, 0
    for round_index in range(rounds):
        prompt = _prompt(tokens + QUESTION_TOKENS, seed=1000 * tokens + round_index)
        with connect(daemon.url) as client:
            before = _entries(client)
            answers = {"cold": alone.run([prompt], NEW_TOKENS), "miss": stored.run([prompt], NEW_TOKENS)}
            _wait_for_chunks(client, before + tokens // CHUNK_TOKENS)
            answers["own_cache"] = alone.run([prompt], NEW_TOKENS)
            answers["warm_dram"] = stored.run([prompt], NEW_TOKENS)
            client.flush()
        daemon.kill()
        daemon.start().close()
        # What is measured is a daemon with an empty memory, not the way back to it.
        stored.run([_prompt(CHUNK_TOKENS, seed=-1 - round_index)], NEW_TOKENS)
        answers["warm_nvme"] = stored.run([prompt], NEW_TOKENS)
        for name, answer in answers.items():
            times[name].append(answer.seconds)
            equal &= answer.tokens == answers["cold"].tokens
        cpu_ratios.append(answers["miss"].cpu_seconds / answers["cold"].cpu_seconds)
        reused = min(answers["warm_dram"].cached[0], answers["warm_nvme"].cached[0])
        told = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in times.items())
        print(f"  {told}, {reused} reused, a miss takes {cpu_ratios[-1]:.3f} times the processor time")
    metrics = {f"ttft.vllm.{name}_seconds{suffix}": median(values) for name, values in times.items()}
    for name in ("own_cache", "miss", "warm_dram", "warm_nvme"):
        ratios = [taken / cold for taken, cold in zip(times[name], times["cold"], strict=True)]
        metrics[f"ttft.vllm.{name}_vs_cold{suffix}"] = median(ratios)
    return {
        **metrics,
        # Time on the processors says what a miss costs even where other processes take their share of them.
        f"ttft.vllm.miss_cpu_vs_cold{suffix}": median(cpu_ratios),
        f"ttft.vllm.reused_tokens{suffix}": reused,
        f"ttft.vllm.equal_tokens{suffix}": float(equal),
    }


def _warm_up(*engines: Engine) -> None:
    """Have every engine compute once what it computes later, so that nobody's first time is measured."""
    for engine in engines:
        for seed in (-100, -101):
            engine.run([_prompt(2 * CHUNK_TOKENS + QUESTION_TOKENS, seed)], NEW_TOKENS)


def _prompt(tokens: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(150_000) for _ in range(tokens)]


def _entries(client: Client) -> int:
    entries: int = client.stats()["tiers"]["dram"]["usage"]["entries"]
    return entries


def _wait_for_chunks(client: Client, entries: int) -> None:
    """Wait until the engine has saved what it computed. Raises BenchError if it does not."""
    until = time.monotonic() + SAVE_SECONDS_MAX
    while _entries(client) < entries:
        if time.monotonic() > until:
            raise BenchError(f"vLLM saved {_entries(client)} chunks in {SAVE_SECONDS_MAX:.0f} s; expected {entries}")
        time.sleep(0.05)
