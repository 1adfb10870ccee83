"""The geometry of a model's KV, and the fingerprint of everything that changes its numbers."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.decoding import decode_json
from kvstore.errors import SpecError

DType = Literal["float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2"]
RopeKind = Literal["none", "default", "linear", "llama3", "yarn", "unknown"]
Scalar = str | int | float | bool | None

ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1}
_BIT_DTYPE: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}

LAYERS_MAX = 4096
HEADS_MAX = 65536
DIM_MAX = 65536
CHUNK_TOKENS_MAX = 65536

Bits = npt.NDArray[np.unsignedinteger]
"""K or V of one layer as bit patterns, shape (heads, tokens, dim), dtype uint8, uint16 or uint32; any strides."""

KVArrays = list[tuple[Bits, Bits]]
"""(K, V) of every layer in order. A codec reads from one or writes into one; strides are the owner's business."""


class Rope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rotary position embedding as the engine applies it to K.

    `dims` is the number of leading dimensions of a head that are rotated (all of them unless the model's rotary is
    partial). `params` are the scaling parameters of the kind, e.g. factor, low_freq_factor, attention_factor. With kind
    "unknown" chunks are reused in place only, never moved to another position.

    Raises:
        SpecError: a number is not finite or out of range.
    """

    kind: RopeKind
    theta: float = 0.0
    dims: int = 0
    params: dict[str, float] = {}

    def __post_init__(self) -> None:
        for field, value in (("theta", self.theta), *((f"params[{n!r}]", v) for n, v in self.params.items())):
            if not math.isfinite(value):
                raise SpecError(f"Rope.{field} is {value}; it must be finite")
        if not 0 <= self.dims <= DIM_MAX:
            raise SpecError(f"Rope.dims is {self.dims}; it must be in 0..{DIM_MAX}")
        # 8 and 8.0 are the same angle and must give the same fingerprint, and so the same JSON.
        msgspec.structs.force_setattr(self, "theta", float(self.theta))
        msgspec.structs.force_setattr(self, "params", {name: float(value) for name, value in self.params.items()})


class KVSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Geometry of one model's KV.

    For multi-head latent attention (`attention="mla"`) there is one head, `key_dim` is the latent's width and
    `value_dim` the width of the rotary slice; the two are stored where K and V are stored otherwise.

    Raises:
        SpecError: a size is out of range or the dtype is unknown.
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: DType
    rope: Rope
    attention: Literal["mha", "mla"] = "mha"

    def __post_init__(self) -> None:
        for field, low, high in (
            ("layers", 1, LAYERS_MAX),
            ("kv_heads", 1, HEADS_MAX),
            ("key_dim", 1, DIM_MAX),
            ("value_dim", 0 if self.attention == "mla" else 1, DIM_MAX),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise SpecError(f"KVSpec.{field} is {value}; it must be in {low}..{high}")
        if self.dtype not in ITEMSIZE:
            raise SpecError(f"KVSpec.dtype is {self.dtype!r}; it must be one of {', '.join(ITEMSIZE)}")
        if self.attention == "mla" and self.kv_heads != 1:
            raise SpecError(f"KVSpec.kv_heads is {self.kv_heads}; latent attention (mla) stores exactly one head")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]

    @property
    def bit_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned NumPy dtype whose bits carry one element (NumPy has no bfloat16 or float8)."""
        return np.dtype(_BIT_DTYPE[self.itemsize])

    @property
    def token_bytes(self) -> int:
        """Bytes of KV of one token, all layers."""
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    def layer_bytes(self, tokens: int) -> int:
        """Bytes of K and V of one layer for `tokens` tokens."""
        return self.kv_heads * tokens * (self.key_dim + self.value_dim) * self.itemsize

    def chunk_bytes(self, tokens: int) -> int:
        """Bytes of the KV of `tokens` tokens, all layers, uncompressed."""
        return tokens * self.token_bytes

    def arrays(self, buffer: memoryview | bytearray | npt.NDArray[np.uint8], tokens: int) -> KVArrays:
        """Views into one flat buffer in canonical order: layer, then K or V, then head, then token, then dimension.

        Args:
            buffer: exactly `chunk_bytes(tokens)` contiguous bytes; the views are writable when it is.
            tokens: number of tokens the buffer holds.

        Raises:
            SpecError: the buffer has another size.
        """
        flat = np.frombuffer(buffer, dtype=np.uint8)
        if flat.nbytes != self.chunk_bytes(tokens):
            raise SpecError(
                f"buffer has {flat.nbytes} bytes; {tokens} tokens of this KVSpec take {self.chunk_bytes(tokens)}"
            )
        arrays: KVArrays = []
        for layer in flat.reshape(self.layers, -1):
            split = self.kv_heads * tokens * self.key_dim * self.itemsize
            keys = layer[:split].view(self.bit_dtype).reshape(self.kv_heads, tokens, self.key_dim)
            values = layer[split:].view(self.bit_dtype).reshape(self.kv_heads, tokens, self.value_dim)
            arrays.append((keys, values))
        return arrays

    def check_arrays(self, arrays: KVArrays, tokens: int) -> None:
        """Raise SpecError unless `arrays` are (K, V) of `tokens` tokens for every layer of this spec."""
        if len(arrays) != self.layers:
            raise SpecError(f"got KV of {len(arrays)} layers; the KVSpec has {self.layers}")
        for layer, pair in enumerate(arrays):
            for name, array, dim in zip("KV", pair, (self.key_dim, self.value_dim), strict=True):
                expected = (self.kv_heads, tokens, dim)
                if array.shape != expected or array.dtype != self.bit_dtype:
                    raise SpecError(
                        f"{name} of layer {layer} is {array.dtype}{array.shape}; "
                        f"expected {self.bit_dtype}{expected} (heads, tokens, dim)"
                    )

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces; equal specs give equal bytes."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> KVSpec:
        """Parse `to_json` output. Raises SpecError on anything else."""
        return _from_json(bytes(data))


@functools.lru_cache(maxsize=64)
def _from_json(data: bytes) -> KVSpec:
    """Kept, because the chunks of a model all name the same spec, and reading it is half the cost of a header."""
    try:
        return decode_json(data, KVSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SpecError(f"not a KVSpec: {error}") from error


def fingerprint(
    spec: KVSpec,
    weights_digest: bytes,
    *,
    lora: bytes = b"",
    quantisation: str = "",
    settings: Mapping[str, Scalar] | None = None,
) -> bytes:
    """32-byte digest of everything that changes the numbers of a model's KV.

    Args:
        spec: geometry, dtype and rope parameters.
        weights_digest: 32-byte digest of the weights themselves (never of a path or name).
        lora: digest of the adapter's weights and scale; empty for none.
        quantisation: name of the weight quantisation scheme; empty for none.
        settings: any other setting of the model that changes KV (sliding window, attention scaling, ...).

    Raises:
        SpecError: `weights_digest` is not 32 bytes.
    """
    if len(weights_digest) != 32:
        raise SpecError(f"weights_digest has {len(weights_digest)} bytes; give a 32-byte digest of the weights")
    digest = hashlib.sha256(b"kvstore-fingerprint-1\0")
    for part in (
        spec.to_json(),
        weights_digest,
        lora,
        quantisation.encode(),
        msgspec.json.encode(dict(settings or {}), order="sorted"),
    ):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def layer_groups(layers: int, group: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive groups of `group` layers; the last may be shorter."""
    for start in range(0, layers, group):
        yield start, min(start + group, layers)
