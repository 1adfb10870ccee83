"""A vLLM engine in a process of its own, told what to do by JSON lines on one pipe and answering on another.

    python vllm_session.py COMMANDS_FD ANSWERS_FD '{"model": ..., "llm": {...}, "connector": {...} | null}'

Commands: {"prompts": [[token id, ...], ...], "new_tokens": n, "fault": kind or "", "fault_rate": 0..1}. Faults are put
between the connector and the store: "miss", "corrupt" (a bit flipped, noticed), "unverified" (a bit flipped, and the
hash made to fit), "slow".
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

# The engine's defaults are for machines with many cores.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

import msgspec  # the environment has to be there first

from kvstore import kernels
from kvstore.client import Client, Part
from kvstore.connect import connect
from kvstore.connectors.vllm import access
from kvstore.outcome import Miss, Reason

COUNTERS = ("external_prefix_cache", "num_preemptions", "kvstore")


class Faults:
    """What goes wrong with the chunks that are fetched, in this process."""

    def __init__(self) -> None:
        self.kind = ""
        self.rate = 0.0
        self._random = random.Random(7)
        self._connect = connect

    def connect(self, *args: Any, **kwargs: Any) -> Client:
        """`kvstore.connect` with faults."""
        client: Any = self._connect(*args, **kwargs)
        fetch = client.fetch
        client.fetch = lambda *args, **kwargs: self._spoil(fetch(*args, **kwargs))
        return client  # type: ignore[no-any-return]

    def _spoil(self, parts: Iterator[Part]) -> Iterator[Part]:
        for part in parts:
            if part.miss is not None or not self.kind or self._random.random() >= self.rate:
                yield part
            elif self.kind == "miss":
                yield Part(part.index, Miss(Reason.IO_ERROR, "injected"))
            elif self.kind == "slow":
                time.sleep(0.3)
                yield part
            else:
                yield flipped(part, keep_hash=self.kind == "corrupt")


def flipped(part: Part, *, keep_hash: bool) -> Part:
    """The part with a high bit of many numbers flipped, under the hash of before or one that fits."""
    groups = []
    for group in part.groups:
        spoilt = []
        for segment, view in group:
            data = bytearray(view)
            for position in range(3, len(data), 64):
                data[position] ^= 0x41
            xxh3 = segment.xxh3 if keep_hash else kernels.xxh3(data)
            spoilt.append((msgspec.structs.replace(segment, xxh3=xxh3), memoryview(data)))
        groups.append(spoilt)
    return msgspec.structs.replace(part, groups=tuple(groups))


def main() -> None:
    """Serve commands until the pipe closes."""
    commands = os.fdopen(int(sys.argv[1]), "r")
    answers = os.fdopen(int(sys.argv[2]), "w")
    config = json.loads(sys.argv[3])
    faults = Faults()
    vars(access)["connect"] = faults.connect
    engine = start(config)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        command = json.loads(line)
        faults.kind, faults.rate = command.get("fault", ""), command.get("fault_rate", 0.0)
        print(json.dumps(run(engine, command)), file=answers, flush=True)


def start(config: dict[str, Any]) -> Any:
    """The engine."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = None
    if config["connector"] is not None:
        transfer = KVTransferConfig(
            kv_connector="KVStoreConnector",
            kv_connector_module_path="kvstore.connectors.vllm.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=config["connector"],
        )
    settings = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        **config["llm"],
    }
    return LLM(model=config["model"], kv_transfer_config=transfer, **settings)


def run(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Tokens, cached tokens and seconds to the first token of each prompt, and the engine's counters so far."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=command["new_tokens"], ignore_eos=True, detokenize=False)
    salt = {"cache_salt": command["salt"]} if command.get("salt") else {}
    prompts = [TokensPrompt(prompt_token_ids=ids, **salt) for ids in command["prompts"]]
    started = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    counters: dict[str, float] = {}
    for metric in engine.get_metrics():
        if hasattr(metric, "value") and any(name in metric.name for name in COUNTERS):
            name = ".".join([metric.name, *filter(None, [metric.labels.get("reason")])])
            counters[name] = counters.get(name, 0) + metric.value
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "finished": [output.outputs[0].finish_reason for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "seconds": seconds,
        "counters": counters,
    }


if __name__ == "__main__":
    main()
