"""The KV of one worker in vLLM's blocks, and its way to and from canonical chunks.

A worker has `heads` of the model's KV heads; a chunk has all of them. What is loaded is decoded whole into staging
memory and the worker's heads are copied into its blocks; what is saved goes the other way. On a GPU the blocks of a
chunk are gathered into one buffer there, which then moves at once, on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from kvstore.connectors.torch_kv import TORCH_DTYPE
from kvstore.connectors.vllm.layouts import Views
from kvstore.spec import KVArrays, KVSpec


def _nothing() -> None:
    """What the CPU was told to compute has been computed."""


class HeadShare(msgspec.Struct, frozen=True):
    """The KV heads `start`..`stop` of the model that a tensor-parallel rank holds; `first` of those that hold them."""

    start: int
    stop: int
    first: bool = True

    @classmethod
    def of(cls, kv_heads: int, ranks: int, rank: int) -> HeadShare:
        """What rank `rank` of `ranks` holds: a slice, or with more ranks than heads a copy of one head.

        `kv_heads` and `ranks` divide one another, which vLLM ensures.
        """
        if kv_heads >= ranks:
            width = kv_heads // ranks
            return cls(rank * width, (rank + 1) * width)
        copies = ranks // kv_heads
        return cls(rank // copies, rank // copies + 1, rank % copies == 0)


class BlockRange(msgspec.Struct, frozen=True):
    """Blocks of a request that hold its tokens from `start` on, in order."""

    start: int
    ids: list[int]


class Staging:
    """Memory for one chunk in canonical order, as torch tensors and as the bits that codecs work on.

    Args:
        spec: geometry of the chunk.
        tokens: tokens of the chunk.
        device: where the engine's blocks are; host memory is pinned, and doubled there, if it is a GPU.
    """

    def __init__(self, spec: KVSpec, tokens: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.spec = spec
        self.host = torch.empty(spec.chunk_bytes(tokens), dtype=torch.uint8, pin_memory=on_gpu)
        self.near = torch.empty_like(self.host, device=device) if on_gpu else self.host
        self.arrays: KVArrays = spec.arrays(self.host.numpy(), tokens)
        self.layers = _layer_tensors(spec, tokens, self.near)

    def to_engine(self) -> None:
        """Move what a codec wrote into `arrays` to where `layers` are."""
        if self.near is not self.host:
            self.near.copy_(self.host, non_blocking=True)

    def to_host(self) -> None:
        """Move what was copied into `layers` to where `arrays` are; it is there after the stream is synchronised."""
        if self.near is not self.host:
            self.host.copy_(self.near, non_blocking=True)


class PagedKV:
    """K and V of every layer of one worker, in blocks.

    Args:
        spec: geometry of the model's KV, all heads.
        layers: views (blocks, heads, tokens, dim) of every layer in order.
        share: the heads that these are.
        block_tokens: tokens of a block as the scheduler counts them, a multiple of the tokens of a block here.
    """

    def __init__(self, spec: KVSpec, layers: Sequence[Views], share: HeadShare, block_tokens: int) -> None:
        self.spec = spec
        self.share = share
        self.block_tokens = block_tokens
        self.device = layers[0][0].device
        self._layers = layers
        self._kernel_tokens = layers[0][0].shape[2]
        cuda: Any = torch.cuda  # whose constructors have no types
        self._stream: torch.cuda.Stream | None = cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def share_spec(self) -> KVSpec:
        """Geometry of the KV of this worker's heads alone."""
        return msgspec.structs.replace(self.spec, kv_heads=self.share.stop - self.share.start)

    def written(self) -> Callable[[], None]:
        """A function that waits, on the copying stream, for what the engine has been told to compute by now."""
        if self._stream is None:
            return _nothing
        cuda: Any = torch.cuda
        event = cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        stream = self._stream

        def wait() -> None:
            stream.wait_event(event)

        return wait

    def scatter(self, staging: Staging, chunk_start: int, start: int, stop: int, blocks: BlockRange) -> None:
        """Copy tokens `start`..`stop` out of a chunk of all heads that begins at token `chunk_start` into blocks."""
        heads = slice(self.share.start, self.share.stop)
        tokens = slice(start - chunk_start, stop - chunk_start)
        with self._copying():
            staging.to_engine()
            block, offset = self._slots(blocks, start, stop)
            for place, chunk in zip(self._layers, staging.layers, strict=True):
                for tensor, source in zip(place, chunk, strict=True):
                    tensor[block, :, offset] = source[heads, tokens].transpose(0, 1)

    def gather(self, staging: Staging, start: int, stop: int, blocks: BlockRange) -> None:
        """Copy tokens `start`..`stop` of this worker's heads out of blocks into a chunk that begins at `start`.

        The chunk has all heads, or these alone.
        """
        own = staging.spec.kv_heads == self.share.stop - self.share.start
        heads = slice(None) if own else slice(self.share.start, self.share.stop)
        with self._copying():
            block, offset = self._slots(blocks, start, stop)
            for place, chunk in zip(self._layers, staging.layers, strict=True):
                for tensor, target in zip(place, chunk, strict=True):
                    target[heads].copy_(tensor[block, :, offset].transpose(0, 1))
            staging.to_host()

    def _slots(self, blocks: BlockRange, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block here, and offset in it, of every token `start`..`stop`."""
        token = torch.arange(start - blocks.start, stop - blocks.start)
        block = torch.tensor(blocks.ids)[token // self.block_tokens]
        inside = token % self.block_tokens
        block = block * (self.block_tokens // self._kernel_tokens) + inside // self._kernel_tokens
        return block.to(self.device), (inside % self._kernel_tokens).to(self.device)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Copy on a stream of its own, if there are any, and be done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


class BlockMemory:
    """Some tokens of one request in blocks, as a `kvstore.connector.KVMemory`.

    Args:
        pages: the worker's blocks.
        staging: memory for a chunk; one thread uses it at a time.
        blocks: the request's blocks.
        start: first token that may be written.
        stop: the token behind the last one that may be written.
        check: called when a chunk has been read; raises if the blocks may have been given to another request meanwhile.
    """

    def __init__(
        self,
        pages: PagedKV,
        staging: Staging,
        blocks: BlockRange,
        start: int = 0,
        stop: int = 0,
        check: Callable[[], None] = _nothing,
    ) -> None:
        self._pages = pages
        self._staging = staging
        self._blocks = blocks
        self._start = start
        self._stop = stop
        self._check = check

    def writable(self, start: int, stop: int) -> KVArrays:
        """Memory for a whole chunk; `commit` moves what of it belongs to the blocks."""
        return self._staging.arrays

    def commit(self, start: int, stop: int) -> None:
        """Copy the tokens that may be written, this worker's heads of them, into the blocks."""
        self._pages.scatter(self._staging, start, max(start, self._start), min(stop, self._stop), self._blocks)

    def readable(self, start: int, stop: int) -> KVArrays:
        """A chunk, of which this worker's heads have been copied out of the blocks."""
        self._pages.gather(self._staging, start, stop, self._blocks)
        self._check()
        return self._staging.arrays


def _layer_tensors(spec: KVSpec, tokens: int, flat: torch.Tensor) -> list[Views]:
    """Views (heads, tokens, dim) of a flat canonical chunk, as `KVSpec.arrays` has them."""
    numbers = flat.view(TORCH_DTYPE[spec.dtype])
    layers, done = [], 0
    for _ in range(spec.layers):
        pair = []
        for dim in (spec.key_dim, spec.value_dim):
            size = spec.kv_heads * tokens * dim
            pair.append(numbers[done : done + size].view(spec.kv_heads, tokens, dim))
            done += size
        layers.append((pair[0], pair[1]))
    return layers
