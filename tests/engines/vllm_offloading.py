"""vLLM's own offloading manager with kvstore's tier below it, moved by hand: everything of it but the GPU is real.

    python tests/engines/vllm_offloading.py '{"settings": {...}, "store": [numbers], "load": [numbers]}'

stores and loads pages with numbered contents in a process of its own, and prints what became of them as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np

PAGE_BYTES = 16384
SECONDS_MAX = 60.0


def contents(number: int) -> Any:
    """The bytes of a page."""
    return np.random.default_rng(number).integers(0, 256, PAGE_BYTES, dtype=np.uint8)


class Offloading:
    """A context manager: what vLLM's scheduler would have.

    Args:
        settings: of the tier.
        pages: how many the CPU memory holds.
        world: workers of tensor parallelism; their parts of a page lie side by side.
    """

    def __init__(self, settings: dict[str, Any], *, pages: int = 8, world: int = 1) -> None:
        from vllm.v1.kv_offload import config as offload
        from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

        tier = {"type": "KVStoreTier", "module_path": "kvstore.connectors.vllm.tier", **settings}
        extra = {"cpu_bytes_to_use": pages * PAGE_BYTES, "secondary_tiers": [tier]}
        degrees: dict[str, Any] = {
            "rank": 0, "world_size": world, "tp_size": world, "pp_size": 1, "pcp_size": 1, "dcp_size": 1,
            "data_parallel_index": 0, "data_parallel_size": 1, "data_parallel_rank_local": None,
            "is_parallelism_agnostic": True,
        }  # fmt: skip
        config = offload.OffloadingConfig(
            groups=(offload.OffloadingGroupConfig(32, ("model.layers.0.attn",), 0),),
            worker_kv_bytes_per_block=PAGE_BYTES // world,
            enable_kv_cache_events=False,
            extra_config=extra,
            engine_id=f"kvstore-test-{os.getpid()}-{uuid4().hex}",
            model=offload.OffloadingModelConfig("org/model", "bfloat16"),
            cache=offload.OffloadingCacheConfig(32, 1),
            parallel=offload.OffloadingParallelConfig(**degrees),
            kv_cache_layout="LBHNC",
        )
        self.manager: Any = TieringOffloadingSpec(config).get_manager()
        self._requests = 0
        self._stats: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def store(self, numbers: list[int]) -> None:
        """A request computes these pages, and they go down."""
        request, keys = self.begin(), [key(number) for number in numbers]
        prepared = self.manager.prepare_store(keys, request)
        assert prepared.keys_to_store == keys
        memory = self.memory()
        for row, number in zip(prepared.store_spec.chunk_ids.tolist(), numbers, strict=True):
            memory[row] = contents(number)
        del memory
        self.manager.complete_store(keys, request)
        self.manager.on_request_finished(request)
        self.settle()

    def found(self, request: Any, numbers: list[int]) -> list[str]:
        """What the manager says of pages once it has made up its mind."""
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            answers = [self.manager.lookup(key(number), request).name for number in numbers]
            if not {"RETRY", "HIT_PENDING"} & set(answers):
                return answers
            assert time.monotonic() < deadline, answers
            self.step()

    def load(self, numbers: list[int]) -> list[str]:
        """A request wants pages: "HIT" and the right bytes, "MISS", or "WRONG"."""
        request = self.begin()
        answers = self.found(request, numbers)
        hits = [number for number, answer in zip(numbers, answers, strict=True) if answer == "HIT"]
        if hits:
            keys = [key(number) for number in hits]
            rows = self.manager.prepare_load(keys, request).chunk_ids.tolist()
            memory = self.memory()
            wrong = {number for row, number in zip(rows, hits, strict=True) if (memory[row] != contents(number)).any()}
            del memory
            self.manager.complete_load(keys, request)
            answers = ["WRONG" if number in wrong else word for number, word in zip(numbers, answers, strict=True)]
        self.manager.on_request_finished(request)
        return answers

    def begin(self) -> Any:
        """A request arrives."""
        from vllm.v1.kv_offload.base import ReqContext

        self._requests += 1
        request = ReqContext(f"request-{self._requests}")
        self.manager.on_new_request(request)
        return request

    def step(self) -> None:
        """One step of the scheduler."""
        from vllm.v1.kv_offload.base import ScheduleEndContext

        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))
        time.sleep(0.002)

    def settle(self) -> None:
        """Steps until no transfer is under way."""
        deadline = time.monotonic() + SECONDS_MAX
        self.step()
        while self.manager.has_pending_work():
            assert time.monotonic() < deadline
            self.step()
        self.step()

    def counted(self, name: str) -> float:
        """The sum of the metrics whose names begin like this."""
        stats = self.manager.get_stats()
        for metric, value in (stats.reduce() if stats is not None else {}).items():
            self._stats[metric] = self._stats.get(metric, 0) + value
        return sum(value for metric, value in self._stats.items() if metric.startswith(f"vllm:{name}"))

    def memory(self) -> Any:
        """vLLM's CPU memory; not to be kept."""
        return np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.manager.shutdown()


def key(number: int) -> Any:
    """vLLM's name of a page."""
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(number.to_bytes(32, "big"), 0)


def main() -> None:
    """Do what the command line says."""
    given = json.loads(sys.argv[1])
    with Offloading(given["settings"]) as offloading:
        if given["store"]:
            offloading.store(given["store"])
        print(json.dumps(offloading.load(given["load"]) if given["load"] else []))


if __name__ == "__main__":
    main()
