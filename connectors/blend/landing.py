"""Where a stored chunk lands on its way into a blended prompt: checked against what was asked for, judged, decoded.

The layers of a chunk may come one after another, while an engine computes on those that are there, or all at once.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import torch

from kvstore.chunk import check_coverage, decode_groups
from kvstore.client import Part
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connectors.blend.sources import KV
from kvstore.connectors.objects import check_lease
from kvstore.connectors.torch_kv import TORCH_DTYPE
from kvstore.container import FLAG_CONTENT_KEY, FLAG_FROM_LOSSY, Header, expect
from kvstore.errors import ContainerError
from kvstore.gate import Verdict
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec

Judge = Callable[[Codec, int], Verdict]
"""Whether chunks of a codec, decoded up to a level, may be blended."""


class WantedChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk to load: its first `tokens` tokens are used, the first of which was computed at `position`.

    With `exact` it was computed behind the very tokens that stand before it, and its key names these too; else it has a
    content key. `tier` and `nbytes` say where it lies, for those who learn how long that takes.
    """

    key: bytes
    tokens: int
    position: int
    exact: bool = False
    tier: str = ""
    nbytes: int = 1


class Landing:
    """Memory for one chunk, in the order of its container, made once its header has come and is as it should be.

    `tensors` are K and V of every layer, (heads, tokens, dim); `codec` and `level` what they were decoded from, None
    and 0 before; `nbytes` what has been decoded.

    Args:
        wanted: the chunk.
        spec: geometry that it must have.
        fingerprint: of the model that it must be of.
        judge: whether a codec's level may be used.
        tokens_max: of a chunk; a longer one is none of ours, and gets no memory.
    """

    def __init__(self, wanted: WantedChunk, spec: KVSpec, fingerprint: bytes, judge: Judge, *, tokens_max: int) -> None:
        self.wanted = wanted
        self._spec = spec
        self._fingerprint = fingerprint
        self._judge = judge
        self._tokens_max = tokens_max
        self._layers = 0
        self._arrays: KVArrays = []
        self.codec: Codec | None = None
        self.level = 0
        self.nbytes = 0
        self.tensors: list[KV] = []

    def take(self, part: Part) -> int:
        """Decode what has come of the chunk, every byte verified; answers up to which layer it has now come.

        Raises:
            ContainerError: it may not be used, with the reason; ungated if it is sound, but not for this reader.
        """
        header = part.header
        if header is None or not part.groups:
            raise ContainerError(Reason.MALFORMED, "the store answered no layers")
        codec = self.codec or self._accept(header)
        stop = self._layers
        for group in part.groups:
            start, after = group[0][0].layers
            if start != stop:
                raise ContainerError(Reason.MALFORMED, f"the store answered layer {start} instead of {stop}")
            level = max(segment.level for segment, _ in group)
            verdict = self._judge(codec, level)
            if not verdict.passed:
                raise ContainerError(Reason.UNGATED, verdict.reason)
            self.level = level
            stop = after
        decode_groups(codec, part.groups, self._arrays, self._spec)
        self.nbytes += sum(segment.length for group in part.groups for segment, _ in group)
        check_lease(part)
        self._layers = stop
        return stop

    def _accept(self, header: Header) -> Codec:
        """Check that the chunk is the one that was asked for, and make room for it."""
        meta, wanted = header.meta, self.wanted
        expect(header, key=wanted.key, fingerprint=self._fingerprint)
        if meta.spec != self._spec or not wanted.tokens <= meta.tokens <= self._tokens_max:
            raise ContainerError(Reason.MALFORMED, "the container is of another geometry or size")
        if bool(meta.flags & FLAG_CONTENT_KEY) == wanted.exact:
            raise ContainerError(Reason.MALFORMED, "the container is of another kind of key")
        if meta.first_position != wanted.position:
            raise ContainerError(
                Reason.MALFORMED, f"the chunk was computed at {meta.first_position}, not at {wanted.position}"
            )
        if meta.flags & FLAG_FROM_LOSSY:
            raise ContainerError(
                Reason.UNGATED, "the chunk has been through a lossy codec that its header does not name"
            )
        check_coverage(header)
        codec = registry.get(header.codec, header.profile)
        self._arrays = self._spec.arrays(np.empty(self._spec.chunk_bytes(meta.tokens), np.uint8), meta.tokens)
        dtype, used = TORCH_DTYPE[self._spec.dtype], slice(0, wanted.tokens)
        self.tensors = [
            (torch.from_numpy(k).view(dtype)[:, used], torch.from_numpy(v).view(dtype)[:, used])
            for k, v in self._arrays
        ]
        self.codec = codec
        return codec
