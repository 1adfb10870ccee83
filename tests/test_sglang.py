"""The HiCache backend keeps SGLang's contract, on a stand-in of its base class and host pool (names of 0.5.23)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvstore.bench.daemon import Daemon
from kvstore.client import PutChunk
from kvstore.connectors.opaque import put_opaque
from kvstore.container import parse
from kvstore.errors import ConfigError

torch = pytest.importorskip("torch", reason="needs the torch extra")

PAGE_TOKENS, LAYERS, TOKENS, WIDTH = 4, 3, 64, 8
MEMORY = {"url": "embedded:?dram=32MiB"}


class HiCacheStorage:
    """Of SGLang's base class what the backend inherits."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        self.registered_pools = {host_pool_name: host_pool}


@dataclass
class Config:
    """SGLang's HiCacheStorageConfig."""

    extra_config: dict[str, Any] | None = None
    model_name: str | None = "org/model"
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    dcp_rank: int = 0
    dcp_size: int = 1
    is_mla_model: bool = False


@dataclass
class Pool:
    """A host pool: (2, layers, tokens, width), or with layout page_first (2, tokens, layers, width)."""

    layout: str = "layer_first"
    dtype: Any = torch.bfloat16
    page_size: int = PAGE_TOKENS
    memory: Any = field(init=False)

    def __post_init__(self) -> None:
        axes = (LAYERS, TOKENS) if self.layout == "layer_first" else (TOKENS, LAYERS)
        self.memory = torch.randn((2, *axes, WIDTH)).to(self.dtype)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        """Addresses and sizes of the spans of each page."""
        starts = indices.tolist()[:: self.page_size]
        spans = []
        for start in starts:
            tokens = slice(start, start + self.page_size)
            for half in (0, 1):
                if self.layout == "layer_first":
                    spans += [self.memory[half, layer, tokens] for layer in range(LAYERS)]
                else:
                    spans.append(self.memory[half, tokens])
        return [span.data_ptr() for span in spans], [span.nbytes for span in spans]


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes backends over a pool and closes them."""
    names = ["sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.mem_cache.hicache_storage"]
    modules = {name: ModuleType(name) for name in names}
    vars(modules[names[-1]])["HiCacheStorage"] = HiCacheStorage
    sys.modules.update(modules)
    backends: list[Any] = []

    def made(
        pool: Pool | None = None, params: dict[str, Any] | None = None, interface_v1: int = 0, **fields: Any
    ) -> Any:
        backend_class = importlib.import_module("kvstore.connectors.sglang").KVStoreHiCache
        extra = {"backend_name": "kvstore", "interface_v1": interface_v1, "kvstore": params or MEMORY}
        config = Config(extra_config=extra, **fields)
        backends.append(backend_class(config, {}))
        if pool is not None:
            backends[-1].register_mem_pool_host(pool)
        return backends[-1]

    yield made
    for backend in backends:
        backend.close()
    for name in (*modules, "kvstore.connectors.sglang"):
        sys.modules.pop(name, None)


def indices(*pages: int) -> Any:
    return torch.tensor([page * PAGE_TOKENS + at for page in pages for at in range(PAGE_TOKENS)])


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_pages_go_out_and_come_back_in_place(make: Callable[..., Any], layout: str) -> None:
    pool = Pool(layout)
    backend = make(pool)
    before = pool.memory.clone()
    assert backend.batch_set_v1(["a", "b", "c"], indices(1, 5, 2)) == [True] * 3
    pool.memory.zero_()
    assert backend.batch_exists(["a", "b", "x", "c"]) == 2
    assert backend.exists("c")
    assert backend.batch_get_v1(["b", "x", "a", "c"], indices(5, 9, 1, 2)) == [True, False, True, True]
    token_axis = 2 if layout == "layer_first" else 1
    there = indices(1, 5, 2)
    assert torch.equal(pool.memory.index_select(token_axis, there), before.index_select(token_axis, there))
    assert not pool.memory.index_select(token_axis, indices(0, 3)).any()


def test_pages_as_tensors(make: Callable[..., Any]) -> None:
    backend = make(Pool())
    values = [torch.randn(40).to(torch.bfloat16) for _ in range(3)]
    assert backend.batch_set(["a", "b"], values[:2])
    assert backend.set("c", values[2].reshape(8, 5).T)  # not contiguous: its elements in its own order
    targets = [torch.zeros(40, dtype=torch.bfloat16) for _ in range(4)]
    first, absent, second, third = backend.batch_get(["a", "x", "b", "c"], targets)
    assert absent is None
    assert torch.equal(first, values[0])
    assert torch.equal(second, values[1])
    assert torch.equal(third, values[2].reshape(8, 5).T.reshape(-1))
    assert backend.get("a", torch.zeros(39, dtype=torch.bfloat16)) is None  # another size is another page


@pytest.mark.parametrize(
    "other",
    [
        {"model_name": "org/other"},
        {"tp_rank": 1, "tp_size": 2},
        {"pp_size": 2},
        {"params": {"namespace": "lora"}},
        {"pool": Pool("page_first")},
        {"pool": Pool(dtype=torch.float16)},
        {"interface_v1": 1},
    ],
    ids=str,
)
def test_what_decides_the_bytes_is_part_of_the_key(
    make: Callable[..., Any], other: dict[str, Any], tmp_path: Path
) -> None:
    with Daemon(tmp_path, dram="32MiB") as daemon:
        daemon.start().close()
        url = {"url": daemon.url}
        assert make(Pool(), url).batch_set_v1(["a"], indices(0)) == [True]
        assert make(Pool(), url).exists("a")
        changed = {"pool": Pool(), **other, "params": {**url, **other.get("params", {})}}
        assert not make(**changed).exists("a")


def test_a_damaged_page_is_a_miss_and_makes_way(make: Callable[..., Any]) -> None:
    backend = make(Pool())
    assert backend.batch_set_v1(["a"], indices(0)) == [True]
    page = backend._in_pool(["a"], indices(0))[0]
    chunk = put_opaque(backend._pages._meta(page), page.spans)
    stored = memoryview(bytearray(chunk.nbytes_max))
    nbytes: int = chunk.write(stored)
    stored[parse(stored[:nbytes]).segments[0].offset] ^= 1

    def write(buffer: memoryview) -> int:
        buffer[:nbytes] = stored[:nbytes]
        return nbytes

    backend._client.delete([chunk.key])
    backend._client.put([PutChunk(chunk.key, nbytes, write)])
    assert backend.batch_get_v1(["a"], indices(0)) == [False]
    assert not backend.exists("a")
    assert backend.batch_set_v1(["a"], indices(0)) == [True]
    assert backend.batch_get_v1(["a"], indices(0)) == [True]


def test_nothing_raises_once_it_is_made(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert make().batch_get_v1(["a"], indices(0)) == [False]  # no pool has been registered
    backend = make(Pool())
    assert backend.batch_set_v1(["a", "b", "c", "d"], indices(0)) == [False] * 4  # one page for four keys
    assert backend.batch_set(["a"], [None]) is False

    def broken(*_: object, **__: object) -> Any:
        raise OSError("gone")

    for verb in ("put", "fetch", "head", "delete"):
        monkeypatch.setattr(backend._client, verb, broken)
    assert backend.batch_set_v1(["a"], indices(0)) == [False]
    assert backend.batch_get_v1(["a"], indices(0)) == [False]
    assert backend.batch_exists(["a"]) == 0
    assert backend.get("a", torch.zeros(4)) is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"params": {"ulr": "x", **MEMORY}}, "did you mean 'url'"),
        ({"params": {"durable": True}}, '"url"'),
        ({"params": {**MEMORY, "load_deadline_ms": 0}}, "load_deadline_ms is 0"),
        ({"params": {**MEMORY, "durable": 3}}, "durable"),
        ({"model_name": None}, "namespace"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(make: Callable[..., Any], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        make(**fields)
    assert "\n" not in str(caught.value)


def test_models_with_more_than_one_pool_are_refused(make: Callable[..., Any]) -> None:
    backend = make(Pool())
    backend.register_mem_host_pool_v2(Pool(), "kv")
    with pytest.raises(ConfigError, match="mamba"):
        backend.register_mem_host_pool_v2(Pool(), "mamba")
