"""A vLLM engine in a process of its own, told what to do by JSON lines on one pipe and answering on another.

    python -m kvstore.bench.vllm_session COMMANDS_FD ANSWERS_FD '{"model": ..., "llm": {...}, "connector": {...}}'

A command is {"prompts": [[token id, ...], ...], "new_tokens": n, "salt": text or nothing, "transfer": nothing, or
kv_transfer_params of each prompt}, or {"idle_hooks": rounds}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from kvstore.bench.timing import seconds

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""One process, and no looking for other machines. To be set before vLLM is imported."""

COUNTERS = ("external_prefix_cache", "num_preemptions", "kvstore")


def serve(commanded: Callable[[dict[str, Any]], None] = lambda command: None) -> None:
    """Serve commands until the pipe closes; `commanded` sees each before it is carried out."""
    commands = os.fdopen(int(sys.argv[1]), "r")
    answers = os.fdopen(int(sys.argv[2]), "w")
    engine = start(json.loads(sys.argv[3]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        command = json.loads(line)
        commanded(command)
        answer = idle_hooks(engine, command["idle_hooks"]) if "idle_hooks" in command else run(engine, command)
        print(json.dumps(answer), file=answers, flush=True)


def start(config: dict[str, Any]) -> Any:
    """The engine."""
    os.environ |= {**ENVIRONMENT, **os.environ}
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
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        **config["llm"],
    }
    return LLM(model=config["model"], kv_transfer_config=transfer, **settings)


def run(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    """What `vllm_engine.Outcome` has."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    params = [
        SamplingParams(
            **greedy, max_tokens=command["new_tokens"], extra_args={"kv_transfer_params": wish} if wish else None
        )
        for wish in command.get("transfer") or [None] * len(command["prompts"])
    ]
    salt = {"cache_salt": command["salt"]} if command.get("salt") else {}
    prompts = [TokensPrompt(prompt_token_ids=ids, **salt) for ids in command["prompts"]]
    started, cpu_started = time.perf_counter(), time.process_time()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    took, cpu_took = time.perf_counter() - started, time.process_time() - cpu_started
    counters: dict[str, float] = {}
    for metric in engine.get_metrics():
        if hasattr(metric, "value") and any(name in metric.name for name in COUNTERS):
            name = ".".join([metric.name, *filter(None, [metric.labels.get("reason")])])
            counters[name] = counters.get(name, 0) + metric.value
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "finished": [output.outputs[0].finish_reason for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "transfer": [output.kv_transfer_params for output in outputs],
        "seconds": took,
        "cpu_seconds": cpu_took,
        "counters": counters,
    }


def idle_hooks(engine: Any, rounds: int) -> dict[str, float]:
    """Microseconds of each of the connector's hooks in a step with nothing to do, the least of some rounds."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

    scheduler = engine.llm_engine.engine_core.engine_core.scheduler.connector
    worker: Any = get_kv_transfer_group()
    step, output = SchedulerOutput.make_empty(), KVConnectorOutput()
    metadata = scheduler.build_connector_meta(step)
    worker.bind_connector_metadata(metadata)
    hooks: dict[str, Callable[[], Any]] = {
        "build_connector_meta": lambda: scheduler.build_connector_meta(step),
        "handle_preemptions": lambda: worker.handle_preemptions(metadata),
        "start_load_kv": lambda: worker.start_load_kv(None),
        "wait_for_layer_load": lambda: worker.wait_for_layer_load("layer"),
        "save_kv_layer": lambda: worker.save_kv_layer("layer", None, None),
        "wait_for_save": worker.wait_for_save,
        "get_transfer_results": lambda: worker.get_transfer_results(set()),
        "get_block_ids_with_load_errors": worker.get_block_ids_with_load_errors,
        "get_kv_connector_stats": worker.get_kv_connector_stats,
        "build_connector_worker_meta": worker.build_connector_worker_meta,
        "update_connector_output": lambda: scheduler.update_connector_output(output),
    }
    took = {name: min(seconds(hook) for _ in range(rounds)) * 1e6 for name, hook in hooks.items()}
    worker.clear_connector_metadata()
    return took


if __name__ == "__main__":
    serve()
