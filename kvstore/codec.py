"""The contract of a codec: tensors in, container segments out, and back.

One codec is one file in codecs/, one line in codecs/registry.py, and one name in four places: class, `id`, module,
golden folder. An id is never reused for other bytes: once released, what it has written must decode for ever.

A codec knows nothing of tiers, files or sockets. It writes into and reads from memory the caller owns:

    plan     what segments a chunk will have, with an upper bound of each one's bytes
    encode   one segment into a buffer
    decode   one layer group, all the segments given for it, into the caller's K and V

`decode` checks the hash of every byte it uses before or while it uses it. When it raises, what it wrote is unspecified
and the caller must treat the chunk as missed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import msgspec

from kvstore.container import ChunkMeta, Segment
from kvstore.errors import ContainerError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec

LAYER_GROUP_BYTES = 1 << 20
"""Layers are grouped until a group's uncompressed KV reaches this size, so that reads and pipelining have useful units.
"""


class SegmentPlan(msgspec.Struct, frozen=True):
    """One segment to be written: where it stands, and an upper bound of its bytes."""

    level: int
    part: int
    layer_start: int
    layer_stop: int
    bytes_max: int

    @property
    def layers(self) -> tuple[int, int]:
        """(start, stop) of the layer group."""
        return self.layer_start, self.layer_stop


class Encoded(msgspec.Struct, frozen=True):
    """What `encode` wrote: size, XXH3-64 of those bytes, and up to 16 bytes of parameters for the segment table."""

    nbytes: int
    xxh3: int
    params: bytes = b""


LayerSegments = Sequence[tuple[Segment, memoryview]]
"""The segments of one layer group with their bytes, in table order."""


class Codec(ABC):
    """One way of writing KV. Instances are immutable and safe to use from many threads at once."""

    id: ClassVar[str]
    """Name in headers and configuration: 1 to 16 ASCII characters."""

    exact: ClassVar[bool]
    """True if decode returns the encoded bits."""

    parallel: ClassVar[bool] = True
    """Whether several threads decode layer groups sooner than one: not where much of the work holds the interpreter's
    lock.
    """

    profile: bytes = ROOT
    """Name of the calibrated profile this instance writes with; zeros for none."""

    variant: str = ""
    """What besides id and profile decides the numbers that this instance's bytes decode to; "" for the default."""

    def __init__(self, profile: bytes = ROOT) -> None:
        if profile != ROOT:
            raise ContainerError(
                Reason.UNKNOWN_PROFILE, f"codec {self.id} has no profiles, asked for {profile.hex()[:12]}"
            )

    @abstractmethod
    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """Segments of a chunk, ordered by (level, layer, part). Raises CodecError if it cannot serve the spec."""

    @abstractmethod
    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        """Write one segment to the start of `target`.

        Args:
            plan: one item of `plan(spec, tokens)`.
            arrays: K and V of all layers of the chunk, any strides.
            spec: geometry of the arrays.
            target: at least `plan.bytes_max` writable bytes.

        Raises:
            CodecError: the values cannot be encoded.
        """

    def encoder(self, meta: ChunkMeta, arrays: KVArrays) -> Callable[[SegmentPlan, memoryview], Encoded]:
        """`encode` for one chunk: a function that is called once for every plan, in order.

        A codec whose segments share work, or that needs to know the chunk's position, overrides it. `meta.spec` and
        `meta.tokens` are the arrays'.
        """
        return lambda plan, target: self.encode(plan, arrays, meta.spec, target)

    @abstractmethod
    def decode(self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec) -> None:
        """Fill the K and V of one layer group of `arrays` (which has all layers) from its segments.

        Raises:
            ContainerError: a hash, length or code is wrong; the group's arrays are then unspecified.
        """


@runtime_checkable
class DecodesOnDevice(Protocol):
    """An optional ability of a codec: to decode into memory of a device, so that less crosses the bus."""

    def decode_on_device(
        self, groups: Sequence[LayerSegments], tensors: Sequence[tuple[Any, Any]], spec: KVSpec
    ) -> None:
        """Fill some layer groups of a chunk on the device that the tensors are on.

        Args:
            groups: the segments of each, as for `Codec.decode`, in host memory; not read after the return.
            tensors: torch tensors, K and V of every layer, (heads, tokens, dim) in the spec's dtype, any strides. What
                the caller asks of the device later, in the same stream, finds them filled.
            spec: geometry of the tensors.

        Raises:
            ContainerError: as `Codec.decode`.
            ImportError: what the device needs is not installed here.
        """


def layers_per_group(spec: KVSpec, tokens: int) -> int:
    """Layers in one group so that its uncompressed KV is about LAYER_GROUP_BYTES."""
    return max(1, min(spec.layers, LAYER_GROUP_BYTES // max(1, spec.layer_bytes(tokens))))
