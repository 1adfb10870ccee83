"""kvstore below vLLM's own offloading: its real factory, spec, manager and CPU memory, and everything but a GPU.

Needs vLLM, so it runs by `make test-vllm` and is skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore import connect
from kvstore.bench.daemon import Daemon
from tests.engines.vllm_offloading import Offloading
from tests.engines.vllm_samples import ENVIRONMENT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see make test-vllm"
)

NUMBERS = [3, 1, 4, 5]
SCRIPT = Path(__file__).with_name("vllm_offloading.py")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="32MiB", nvme="64MiB") as daemon:
        daemon.start().close()
        yield daemon


def settings(daemon: Daemon, **more: Any) -> dict[str, Any]:
    """With deadlines that busy cores do not miss."""
    deadlines = {"lookup_deadline_ms": 30_000.0, "load_deadline_ms": 30_000.0, "store_deadline_ms": 30_000.0}
    return {"url": daemon.url, "weights_identity": "test", "durable": True, **deadlines, **more}


def test_pages_go_down_and_come_back_bit_for_bit(daemon: Daemon) -> None:
    with Offloading(settings(daemon), pages=8) as offloading:
        assert offloading.load(NUMBERS) == ["MISS"] * 4
        assert offloading.counted("kvstore_tier_lookup_misses") == 4
        offloading.store(NUMBERS)
        assert offloading.load(NUMBERS) == ["HIT"] * 4
        assert offloading.counted("kvstore_tier_saved_pages") == 4
        assert offloading.counted("kvstore_tier_loaded_pages") == 0, "vLLM had them in its own memory"
        offloading.store([10, 11, 12, 13, 14, 15, 16])  # vLLM's memory of 8 pages lets the first ones go
        assert offloading.load([*NUMBERS, 9]) == ["HIT"] * 4 + ["MISS"]
        assert offloading.counted("kvstore_tier_loaded_pages") >= 3
        assert offloading.counted("kv_offload_tiering_promotion_job_failures") == 0


def test_another_process_finds_what_the_first_has_stored(daemon: Daemon) -> None:
    command = json.dumps({"settings": settings(daemon), "store": NUMBERS, "load": []})
    subprocess.run([sys.executable, SCRIPT, command], env={**os.environ, **ENVIRONMENT}, check=True, timeout=300)
    daemon.kill()
    daemon.start().close()
    with Offloading(settings(daemon)) as offloading:
        assert offloading.load([*NUMBERS, 9]) == ["HIT"] * 4 + ["MISS"]
        assert offloading.counted("kvstore_tier_loaded_pages") == 4
        assert offloading.counted("kv_offload_tiering_chunk_hits") >= 4
    for other in ({"namespace": "adapter"}, {"weights_identity": "fine-tuned"}):
        with Offloading(settings(daemon, **other)) as offloading:
            assert offloading.load(NUMBERS) == ["MISS"] * 4
    with Offloading(settings(daemon), world=2) as offloading:
        assert offloading.load(NUMBERS) == ["MISS"] * 4, "two ranks lay a page out in another way"


def test_damage_on_the_disk_is_a_miss_and_never_a_wrong_byte(daemon: Daemon, tmp_path: Path) -> None:
    numbers = list(range(8))
    with Offloading(settings(daemon)) as offloading:
        offloading.store(numbers)
    daemon.kill()
    generator = np.random.default_rng(1)
    for volume in (tmp_path / "nvme").rglob("*"):
        if volume.is_file() and volume.stat().st_size > 1 << 20:
            with volume.open("r+b") as file:
                for at in generator.integers(1 << 20, 2 << 20, 60).tolist():
                    file.seek(at)
                    file.write(os.urandom(3))
    daemon.start().close()
    with Offloading(settings(daemon)) as offloading:
        answers = offloading.load(numbers)
        assert set(answers) <= {"HIT", "MISS"}
        assert "MISS" in answers, "no flipped byte lay in a page"
        lost = [number for number, answer in zip(numbers, answers, strict=True) if answer == "MISS"]
        assert offloading.counted("kvstore_tier_failed_loads") + offloading.counted("kvstore_tier_lookup_misses") > 0
        offloading.store(lost)
        offloading.manager.primary_tier.reset_cache()
        assert offloading.load(lost) == ["HIT"] * len(lost)


def test_an_engine_whose_daemon_dies_goes_on_and_finds_it_again(daemon: Daemon) -> None:
    quick = settings(daemon, lookup_deadline_ms=1_000.0, load_deadline_ms=2_000.0, store_deadline_ms=2_000.0)
    with Offloading(quick) as offloading:
        offloading.store(NUMBERS)
        offloading.manager.primary_tier.reset_cache()
        request = offloading.begin()
        offloading.found(request, [9])  # the request knows that the store is there
        daemon.kill()
        assert offloading.load(NUMBERS) == ["MISS"] * 4
        offloading.manager.on_request_finished(request)
        offloading.store([20, 21])
        assert offloading.load([20, 21]) == ["HIT"] * 2, "vLLM's own memory has nothing to do with it"
        daemon.start().close()
        for _ in range(100):
            if offloading.load(NUMBERS) == ["HIT"] * 4:
                break
        else:
            pytest.fail("the tier does not find the store again")


def test_a_daemon_that_dies_between_lookup_and_load_is_a_failed_load(daemon: Daemon) -> None:
    with Offloading(settings(daemon, load_deadline_ms=2_000.0)) as offloading:
        offloading.store(NUMBERS)
        offloading.manager.primary_tier.reset_cache()
        (tier,) = offloading.manager.secondary_tiers
        request = offloading.begin()
        while tier.lookup(_key(NUMBERS[0]), request).name == "RETRY":
            offloading.step()
        daemon.kill()
        assert offloading.found(request, NUMBERS[:1]) == ["MISS"]
        assert offloading.counted("kvstore_tier_failed_loads") == 1
        offloading.manager.on_request_finished(request)
        offloading.settle()


def test_after_a_change_of_weights_nothing_of_before_is_found(daemon: Daemon) -> None:
    with Offloading(settings(daemon)) as offloading:
        offloading.store(NUMBERS)
        offloading.manager.reset_cache()
        assert offloading.load(NUMBERS) == ["MISS"] * 4
        offloading.store(NUMBERS)
        offloading.manager.primary_tier.reset_cache()
        assert offloading.load(NUMBERS) == ["HIT"] * 4
    with connect(daemon.url) as client:
        assert client.stats()["tiers"]["dram"]["usage"]["entries"] == 8


def _key(number: int) -> Any:
    from tests.engines.vllm_offloading import key

    return key(number)
