"""The HiCache backend behind SGLang's own factory, host pools and cache controller: pages come back as they were.

Needs SGLang, so it runs by `make test-sglang` and is skipped elsewhere. The controller is SGLang's, without the device
above it: its own methods hash the tokens, ask, back up and prefetch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.bench.daemon import Daemon
from kvstore.connect import connect
from kvstore.errors import ConfigError

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; see make test-sglang", allow_module_level=True)

import torch
from sglang.srt.managers.cache_controller import (  # type: ignore[import-not-found]
    HiCacheController,
    PrefetchOperation,
    StorageOperation,
)
from sglang.srt.mem_cache.device_pool_info import (  # type: ignore[import-not-found]
    KVBufferLayout,
    KVBuffers,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig  # type: ignore[import-not-found]
from sglang.srt.mem_cache.pool_host import common, mha, mla  # type: ignore[import-not-found]
from sglang.srt.mem_cache.storage import StorageBackendFactory  # type: ignore[import-not-found]
from sglang.srt.mem_cache.utils import get_storage_hash_str  # type: ignore[import-not-found]

VERSION = (Path(__file__).parent / "requirements.txt").read_text().rpartition("sglang==")[2].strip()
LAYERS, HEADS, DIM, PAGE_TOKENS, POOL_TOKENS = 4, 4, 32, 16, 256
LATENT, ROPE = 48, 16
PAGES = 9
TOKENS = list(range(1000, 1000 + PAGES * PAGE_TOKENS))
MHA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct")
POOLS = [("mha", layout) for layout in MHA_LAYOUTS] + [("mla", layout) for layout in MLA_LAYOUTS]


def plain(dims: Any, dtype: Any, device: Any, **_: object) -> Any:
    """Memory of a host pool; SGLang's own would register it with CUDA."""
    return torch.zeros(dims, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, mha, mla):
        if hasattr(module, "ALLOC_MEMORY_FUNCS"):
            monkeypatch.setattr(module, "ALLOC_MEMORY_FUNCS", {"cpu": plain})


def addresses(tensors: tuple[Any, ...]) -> Any:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def host_pool(kind: str, layout: str, dtype: Any = torch.bfloat16) -> Any:
    """SGLang's host pool of one kind of attention, over device buffers that are on the CPU."""
    options = {"pin_memory": False, "device": "cpu", "device_capacity_tokens": POOL_TOKENS}
    options |= {"start_layer": 0, "end_layer": LAYERS}
    shared = {"page_size": PAGE_TOKENS, "dtype": dtype, "device": torch.device("cpu")}
    if kind == "mha":
        keys, values = (
            tuple(torch.zeros(POOL_TOKENS, HEADS, DIM, dtype=dtype) for _ in range(LAYERS)) for _ in range(2)
        )
        buffers = KVBuffers(
            k=keys, v=values, k_data_ptrs=addresses(keys), v_data_ptrs=addresses(values), layout=KVBufferLayout.NHD
        )
        info = MHABufferInfo(buffers=buffers, head_num=HEADS, head_dim=DIM, v_head_dim=DIM, **shared)
        return mha.MHATokenToKVPoolHost(info, 2.0, 0, PAGE_TOKENS, layout, **options)
    rows = tuple(torch.zeros(POOL_TOKENS, 1, LATENT + ROPE, dtype=dtype) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=addresses(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        kv_cache_dim=LATENT + ROPE,
        **shared,
    )
    return mla.MLATokenToKVPoolHost(info, 2.0, 0, PAGE_TOKENS, layout, target_layer_num=LAYERS, **options)


class Controller(HiCacheController):  # type: ignore[misc]
    """SGLang's controller, of which only the side of the storage is set up."""

    def __init__(self, url: str, pool: Any, *, zero_copy: bool, is_mla: bool, **fields: Any) -> None:
        extra = {
            "backend_name": "kvstore",
            "module_path": "kvstore.connectors.sglang",
            "class_name": "KVStoreHiCache",
            "interface_v1": int(zero_copy),
            "kvstore": {"url": url, "load_deadline_ms": 30_000.0},
        }
        ranks = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
        self.storage_config = HiCacheStorageConfig(
            **{**ranks, "model_name": "org/model", **fields},
            is_mla_model=is_mla,
            enable_storage_metrics=False,
            is_page_first_layout=pool.layout != "layer_first",
            extra_config=extra,
        )
        self.storage_host_pool = pool
        self.page_size = PAGE_TOKENS
        self.prefetch_sync_queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.storage_backend = StorageBackendFactory.create_backend("dynamic", self.storage_config, pool)
        self.storage_backend.register_mem_pool_host(pool)
        self.storage_backend.on_host_pools_registered()
        self.page_get_func = self._page_get_zero_copy if zero_copy else self._generic_page_get
        self.page_set_func = self._page_set_zero_copy if zero_copy else self._generic_page_set

    def back_up(self, indices: Any, tokens: list[int]) -> int:
        """Write pages below; answers the tokens that the controller believes stored."""
        hashes = get_storage_hash_str(tokens, None, page_size=PAGE_TOKENS)
        operation = StorageOperation(indices, tokens, hash_value=hashes, prefix_keys=[])
        self._page_backup(operation)
        return int(operation.completed_tokens)

    def find(self, tokens: list[int]) -> list[str]:
        """Names of the leading pages that are below."""
        names: list[str] = self._storage_hit_query(PrefetchOperation("find", tokens))[0]
        return names

    def prefetch(self, indices: Any, tokens: list[int]) -> int:
        """Read the leading pages that are below into the pool; answers how many came."""
        operation = PrefetchOperation("read", tokens, prefix_keys=[])
        operation.hash_value = self.find(tokens)
        operation.host_indices = indices[: len(operation.hash_value) * PAGE_TOKENS]
        return int(self._page_transfer(operation))


Make = Callable[..., Controller]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="32MiB", nvme="64MiB") as running:
        running.start().close()
        yield running


@pytest.fixture
def make(daemon: Daemon) -> Iterator[Make]:
    """Makes controllers, each with a backend of its own, over one daemon."""
    made: list[Controller] = []

    def controller(
        kind: str, layout: str, *, zero_copy: bool = True, dtype: Any = torch.bfloat16, **fields: Any
    ) -> Any:
        pool = host_pool(kind, layout, dtype)
        made.append(Controller(daemon.url, pool, zero_copy=zero_copy, is_mla=kind == "mla", **fields))
        return made[-1]

    yield controller
    for each in made:
        each.storage_backend.close()


def filled(controller: Controller) -> tuple[Any, list[Any]]:
    """Rows of the pool with random pages in them, and what each page holds."""
    pool = controller.storage_host_pool
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    indices = pool.alloc(PAGES * PAGE_TOKENS)
    return indices, [pool.get_data_page(int(indices[at * PAGE_TOKENS])).clone() for at in range(PAGES)]


def same(controller: Controller, indices: Any, pages: list[Any]) -> list[bool]:
    pool = controller.storage_host_pool
    return [torch.equal(pool.get_data_page(int(indices[at * PAGE_TOKENS])), page) for at, page in enumerate(pages)]


def test_this_is_the_version_that_the_documentation_names() -> None:
    assert importlib.metadata.version("sglang") == VERSION


def test_the_backend_keeps_the_signatures_of_the_base_class() -> None:
    from kvstore.connectors.sglang import KVStoreHiCache

    assert issubclass(KVStoreHiCache, HiCacheStorage)
    assert not inspect.isabstract(KVStoreHiCache)
    for name, method in vars(KVStoreHiCache).items():
        base = getattr(HiCacheStorage, name, None)
        if not name.startswith("_") and base is not None:
            ours, theirs = (list(inspect.signature(each).parameters) for each in (method, base))
            assert ours == theirs, name


@pytest.mark.parametrize("zero_copy", [True, False], ids=["v1", "v0"])
@pytest.mark.parametrize(("kind", "layout"), POOLS)
def test_pages_come_back_as_they_were(make: Make, kind: str, layout: str, zero_copy: bool) -> None:
    controller = make(kind, layout, zero_copy=zero_copy)
    indices, pages = filled(controller)
    assert controller.find(TOKENS) == []
    assert controller.back_up(indices, TOKENS) == len(TOKENS)
    controller.storage_host_pool.kv_buffer.zero_()
    assert len(controller.find([*TOKENS, *range(PAGE_TOKENS)])) == PAGES
    assert controller.prefetch(indices, TOKENS) == PAGES
    assert same(controller, indices, pages) == [True] * PAGES


@pytest.mark.parametrize("zero_copy", [True, False], ids=["v1", "v0"])
@pytest.mark.parametrize(("kind", "layout"), POOLS)
def test_a_second_server_reads_them_into_other_rows(make: Make, kind: str, layout: str, zero_copy: bool) -> None:
    first, second = (make(kind, layout, zero_copy=zero_copy) for _ in range(2))
    indices, pages = filled(first)
    assert first.back_up(indices, TOKENS) == len(TOKENS)
    rows = second.storage_host_pool.alloc(PAGES * PAGE_TOKENS).reshape(PAGES, PAGE_TOKENS).flip(0).reshape(-1)
    assert second.prefetch(rows, TOKENS) == PAGES
    assert same(second, rows, pages) == [True] * PAGES


@pytest.mark.parametrize(("kind", "layout"), POOLS)
def test_a_server_of_the_other_interface_never_gets_bytes_in_another_order(make: Make, kind: str, layout: str) -> None:
    first, second = make(kind, layout, zero_copy=True), make(kind, layout, zero_copy=False)
    indices, _ = filled(first)
    assert first.back_up(indices, TOKENS) == len(TOKENS)
    assert second.find(TOKENS) == []


def test_pages_survive_kill_9_of_the_daemon(make: Make, daemon: Daemon) -> None:
    first = make("mha", "page_first")
    indices, pages = filled(first)
    assert first.back_up(indices, TOKENS) == len(TOKENS)
    with connect(daemon.url) as client:
        assert client.flush(deadline_ms=30_000)
    daemon.kill()
    assert first.prefetch(indices, TOKENS) == 0
    daemon.start().close()
    again = make("mha", "page_first")
    rows = again.storage_host_pool.alloc(PAGES * PAGE_TOKENS)
    assert again.prefetch(rows, TOKENS) == PAGES
    assert same(again, rows, pages) == [True] * PAGES


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("page_first", {}),
        ("layer_first", {"model_name": "org/other"}),
        ("layer_first", {"tp_rank": 1, "tp_size": 2}),
        ("layer_first", {"pp_rank": 1, "pp_size": 2}),
        ("layer_first", {"dtype": torch.float16}),
    ],
)
def test_servers_that_keep_other_bytes_do_not_share(make: Make, layout: str, fields: dict[str, Any]) -> None:
    first = make("mha", "layer_first")
    indices, _ = filled(first)
    assert first.back_up(indices, TOKENS) == len(TOKENS)
    assert make("mha", "layer_first").find(TOKENS)
    assert make("mha", layout, **fields).find(TOKENS) == []


def test_models_with_more_pools_are_refused(make: Make) -> None:
    controller = make("mha", "page_first")
    with pytest.raises(ConfigError, match="mamba"):
        controller.storage_backend.register_mem_host_pool_v2(controller.storage_host_pool, "mamba")
