"""R32 on a CUDA GPU, for `make gpu-check`: the same bits as the reference, and how many elements a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from kvstore.codecs.r32 import Layout, TableSet, coder, quantise
from kvstore.testing import r32

ROUNDS = 20
CHUNKS = 16
TILES_A_CHUNK = 512
VALUES_PER_SYMBOL = 2


def checks() -> list[tuple[str, Callable[[], str]]]:
    """(name, check) pairs; a check returns what it measured, or raises."""
    return [
        ("r32 bit identity", same_bits),
        ("r32 decode speed", lambda: _speed(ballot=False)),
        ("r32 decode speed, ballot", lambda: _speed(ballot=True)),
    ]


def same_bits() -> str:
    """Encodes and decodes on the GPU as the reference does, whole tiles and damaged ones, with ballot and without."""
    from kvstore.codecs.r32 import triton_kernels

    cases = 0
    for lanes in (8, 16, 32):
        for alphabet in (1, 15, 256):
            random = np.random.default_rng(alphabet + lanes)
            tables = r32.random_tables(random, 3, alphabet, 3.0)
            counts = random.integers(0, 900, 12).astype(np.uint32)
            layout = Layout(counts, random.integers(0, 3, (12, 2, lanes)).astype(np.uint16), lanes)
            symbols = r32.random_symbols(random, layout, tables)
            coded = r32.encode("reference", symbols, layout, tables)
            hurt = coded.stream.copy()
            hurt[random.integers(0, len(hurt), 4)] ^= 0x40
            expected = r32.decode("reference", r32.Coded(hurt, coded.lengths), layout, tables)[1]
            on_gpu = triton_kernels.DeviceTables.of(tables, "cuda")
            for ballot in (False, True):
                stream, lengths = triton_kernels.encode(torch.from_numpy(symbols).cuda(), layout, on_gpu, ballot=ballot)
                assert np.array_equal(lengths, coded.lengths), "another size"
                assert np.array_equal(stream.cpu().numpy(), coded.stream), "other bytes"
                decoded, ok = triton_kernels.decode(stream, lengths, layout, on_gpu, ballot=ballot)
                assert bool(ok.all()), "a whole tile was refused"
                assert np.array_equal(decoded.cpu().numpy(), symbols), "other symbols"
                _, ok = triton_kernels.decode(torch.from_numpy(hurt).cuda(), lengths, layout, on_gpu, ballot=ballot)
                assert ok.tolist() == expected.tolist(), "damage was judged otherwise"
                cases += 1
    return f"{cases} cases"


def _speed(*, ballot: bool) -> str:
    """Decodes chunks of 256 tokens of Llama-3-8B at about 3 bits an element."""
    from kvstore.codecs.r32 import triton_kernels

    layout = Layout.of(tiles=CHUNKS * TILES_A_CHUNK, symbols=256 * 128 // VALUES_PER_SYMBOL)
    tables = TableSet(quantise(np.exp(-0.5 * np.arange(-6.0, 6.5, 0.075)[None, :160] ** 2 / 1.6)))
    symbols = r32.random_symbols(np.random.default_rng(0), layout, tables)
    target = np.empty(layout.bytes_max, dtype=np.uint8)
    lengths = coder.encode(target, symbols, layout, tables, threads=8)
    stream = torch.from_numpy(target[: int(lengths.sum())]).cuda()
    on_gpu = triton_kernels.DeviceTables.of(tables, "cuda")
    decoded, ok = triton_kernels.decode(stream, lengths, layout, on_gpu, ballot=ballot)
    assert bool(ok.all()), "a whole tile was refused"
    assert np.array_equal(decoded.cpu().numpy(), symbols), "other symbols"
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        triton_kernels.decode(stream, lengths, layout, on_gpu, ballot=ballot)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / ROUNDS
    elements = layout.symbols * VALUES_PER_SYMBOL
    return f"{elements / seconds / 1e9:.1f} G elements/s, {8 * int(lengths.sum()) / elements:.2f} bits an element"
