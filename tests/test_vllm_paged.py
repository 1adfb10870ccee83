"""vLLM's blocks to canonical chunks and back, in every layout and memory order, against a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.connectors.vllm.layouts import LAYOUTS, Views, kv_views
from kvstore.connectors.vllm.paged import BlockMemory, BlockRange, HeadShare, PagedKV, Staging
from kvstore.errors import UnsupportedModelError
from kvstore.spec import KVSpec
from kvstore.testing.chunks import sample_spec
from kvstore.testing.vllm import ORDERS, cache_tensors, reference_kv

CPU = torch.device("cpu")
TOKEN_MAJOR = [("CPU_ATTN/vec", order) for order in ORDERS if order.endswith("NHC")]
KNOWN = [
    (layout, order)
    for layout in LAYOUTS
    for order in ORDERS
    if not (layout.startswith("CPU_ATTN/") and order.endswith("NHC"))
]


def views(layout: str, caches: list[torch.Tensor], spec: KVSpec) -> list[Views]:
    dims = {"heads": spec.kv_heads, "key_dim": spec.key_dim, "value_dim": spec.value_dim}
    return [kv_views(layout, cache, **dims) for cache in caches]


def pages(layout: str, caches: list[torch.Tensor], spec: KVSpec, block_tokens: int) -> PagedKV:
    return PagedKV(spec, views(layout, caches, spec), HeadShare(0, spec.kv_heads), block_tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "order"), KNOWN)
def test_a_chunk_is_what_the_backend_wrote(layout: str, order: str, dtype: str) -> None:
    spec, blocks = sample_spec(layers=3, kv_heads=2, dim=8, dtype=dtype), [5, 0, 3, 2]
    caches = cache_tensors(order, spec, 6, 4, seed=1)
    memory = BlockMemory(pages(layout, caches, spec, 4), Staging(spec, 16, CPU), BlockRange(0, blocks))
    for layer, arrays in enumerate(memory.readable(0, 16)):
        for head in range(spec.kv_heads):
            parts = [reference_kv(layout, caches[layer], block, head, spec.key_dim) for block in blocks]
            for array, whole in zip(arrays, map(torch.cat, zip(*parts, strict=True)), strict=True):
                bits = whole.contiguous().view(torch.uint8).numpy()
                np.testing.assert_array_equal(np.ascontiguousarray(array[head]).view(np.uint8), bits)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_saved_comes_back_in_other_blocks_of_another_size(data: st.DataObject) -> None:
    spec = sample_spec(layers=2, kv_heads=2, dim=4)
    layout = data.draw(st.sampled_from(LAYOUTS))
    chunk = data.draw(st.sampled_from([8, 16, 24]))
    saved, loaded = data.draw(st.sampled_from([2, 4, 8, 16, 32])), data.draw(st.sampled_from([2, 4, 8, 16, 32]))
    kernel = data.draw(st.sampled_from([size for size in (2, 4, 8, 16, 32) if loaded % size == 0]))
    chunks = data.draw(st.integers(-(-loaded // chunk), 6))
    total = chunks * chunk
    table = data.draw(st.permutations(range(-(-total // saved) + 2)))[: -(-total // saved)]
    source = cache_tensors("LBHNC", spec, len(table) + 2, saved, seed=2)
    memory = BlockMemory(pages(layout, source, spec, saved), Staging(spec, chunk, CPU), BlockRange(0, list(table)))
    stored = [[(k.copy(), v.copy()) for k, v in memory.readable(i * chunk, (i + 1) * chunk)] for i in range(chunks)]

    # Only whole blocks are loaded, from some block on; those before and behind hold something else, and keep it.
    stop = total // loaded * loaded
    start = data.draw(st.integers(0, stop // loaded - 1)) * loaded
    count = (stop - start) // loaded
    ids = list(data.draw(st.permutations(range(count + 2)))[:count])
    target = cache_tensors("LBHNC", spec, (count + 2) * loaded // kernel, kernel)
    pages_there = pages(layout, target, spec, loaded)
    into = BlockMemory(pages_there, Staging(spec, chunk, CPU), BlockRange(start, ids), start, stop)
    for index in range(start // chunk, -(-stop // chunk)):
        for (key, value), (from_key, from_value) in zip(
            into.writable(index * chunk, (index + 1) * chunk), stored[index], strict=True
        ):
            key[:], value[:] = from_key, from_value
        into.commit(index * chunk, (index + 1) * chunk)
    whole = [np.concatenate([part[layer][0] for part in stored], axis=1) for layer in range(spec.layers)]
    for layer, cache in enumerate(target):
        for position, block in enumerate(ids):
            small = [block * loaded // kernel + i for i in range(loaded // kernel)]
            keys = torch.cat([reference_kv(layout, cache, one, 1, spec.key_dim)[0] for one in small])
            at = start + position * loaded
            np.testing.assert_array_equal(keys.view(torch.uint16).numpy(), whole[layer][1, at : at + loaded])
        untouched = set(range(count + 2)) - set(ids)
        assert all(not cache[block * loaded // kernel].any() for block in untouched)


@pytest.mark.parametrize(("heads", "ranks"), [(4, 1), (4, 2), (4, 4), (2, 4), (1, 4)])
def test_every_head_is_held_and_saved_by_exactly_one_rank(heads: int, ranks: int) -> None:
    shares = [HeadShare.of(heads, ranks, rank) for rank in range(ranks)]
    saved = [head for share in shares if share.first for head in range(share.start, share.stop)]
    assert saved == list(range(heads))
    assert {share.stop - share.start for share in shares} == {max(1, heads // ranks)}
    assert shares[0].first


def test_a_rank_reads_and_writes_its_heads_alone() -> None:
    spec = sample_spec(layers=2, kv_heads=4, dim=4)
    share = HeadShare.of(4, 2, 1)
    own = sample_spec(layers=2, kv_heads=2, dim=4)
    caches = cache_tensors("LBHNC", own, 2, 8, seed=3)
    rank = PagedKV(spec, views("FLASH_ATTN", caches, own), share, 8)
    assert rank.share_spec == own
    whole, part = Staging(spec, 16, CPU), Staging(own, 16, CPU)
    for staging in (whole, part):
        staging.host.zero_()
        rank.gather(staging, 0, 16, BlockRange(0, [1, 0]))
    for (keys, _), (own_keys, _) in zip(whole.arrays, part.arrays, strict=True):
        np.testing.assert_array_equal(keys[2:], own_keys)
        assert not keys[:2].any()
    before = [cache.clone() for cache in caches]
    for cache in caches:
        cache.zero_()
    rank.scatter(whole, 0, 0, 16, BlockRange(0, [1, 0]))
    assert all(torch.equal(cache, known) for cache, known in zip(caches, before, strict=True))


@pytest.mark.parametrize(("layout", "order"), TOKEN_MAJOR)
def test_an_order_that_vllm_never_uses_with_a_layout_is_refused(layout: str, order: str) -> None:
    spec = sample_spec(layers=1, kv_heads=2, dim=8)
    with pytest.raises(UnsupportedModelError, match="only head-major blocks are known"):
        views(layout, cache_tensors(order, spec, 2, 4), spec)


@pytest.mark.parametrize("layout", ["CPU_ATTN/amx", "CPU_ATTN/unknown", "FLASHINFER", ""])
def test_a_layout_that_is_not_known_is_refused_by_its_name(layout: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{layout!r} keeps its KV in an unknown layout; known are FLASH"):
        kv_views(layout, torch.zeros(2, 2, 4, 16), heads=2, key_dim=8, value_dim=8)


@pytest.mark.parametrize("shape", [(2, 2, 4, 17), (2, 3, 4, 16), (2, 2, 2, 4, 16), (2, 64)])
def test_a_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModelError, match="known is"):
        kv_views("FLASH_ATTN", torch.zeros(shape), heads=2, key_dim=8, value_dim=8)
