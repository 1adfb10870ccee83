"""Profiles: the calibrated tables of a model, in one blob named by its content.

    magic "KVP1" | version u16 | zero u16 | header bytes u32 | header | arrays | XXH3-64 of all before it

The header is canonical JSON (sorted keys, no spaces): `attributes`, whatever the codecs need to know in JSON, and
`arrays`, a list of name, dtype and shape. Arrays lie in that order, little-endian, C order, each at the next multiple
of 64 bytes from the blob's start, the gaps zero. The profile's id is the SHA-256 of the blob: the 32 bytes that
containers name. Tables of several codecs share one blob: their attributes and arrays are named `<codec>` and
`<codec>.<name>`.

`parse_profile` trusts nothing: sizes are checked before they are used, and arrays are read-only views, so that it
allocates no more than the header. docs/format.md has the tables.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore import kernels
from kvstore.decoding import convert, decode_json
from kvstore.errors import ContainerError, SpecError
from kvstore.outcome import Reason

MAGIC = b"KVP1"
VERSION = 1
ALIGN = 64
HEADER_BYTES_MAX = 1 << 20
ARRAYS_MAX = 4096

_FIXED = struct.Struct("<4sHHI")
_HASH = struct.Struct("<Q")

Array = npt.NDArray[Any]
_DTypeName = Literal["float16", "float32", "float64", "int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"]
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    dtype: _DTypeName
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=8)]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    attributes: dict[str, Any]
    arrays: Annotated[tuple[_Entry, ...], msgspec.Meta(max_length=ARRAYS_MAX)]


class Profile(msgspec.Struct, frozen=True, eq=False):
    """A parsed profile. `arrays` are read-only views of `blob`; `id` is its SHA-256."""

    id: bytes
    attributes: dict[str, Any]
    arrays: dict[str, Array]
    blob: memoryview

    def array(self, name: str, dtype: str, *shape: int | None) -> Array:
        """The array of that name, dtype and shape (None: any size on that axis).

        Raises:
            ContainerError: malformed, if there is none.
        """
        found = self.arrays.get(name)
        fits = (
            found is not None
            and found.dtype == np.dtype(dtype)
            and len(shape) == found.ndim
            and all(want is None or want == have for want, have in zip(shape, found.shape, strict=True))
        )
        if found is None or not fits:
            have = "nothing" if found is None else f"{found.dtype}{found.shape}"
            raise ContainerError(Reason.MALFORMED, f"profile has {have} where {name} {dtype}{shape} should be")
        return found


def pack_profile(attributes: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """The blob of a profile; equal content gives equal bytes.

    Raises:
        SpecError: attributes are not JSON, an array has a dtype that profiles do not hold, or there are too many.
    """
    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    try:
        entries = tuple(
            convert({"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}, _Entry)
            for name, array in ordered.items()
        )
        header = msgspec.json.encode(_Header(dict(attributes), entries), order="sorted")
        decode_json(header, _Header)
    except (msgspec.MsgspecError, TypeError) as error:
        raise SpecError(f"not a profile: {error}") from error
    if len(header) > HEADER_BYTES_MAX:
        raise SpecError(f"the profile's header has {len(header)} bytes; at most {HEADER_BYTES_MAX}")
    out = bytearray(_FIXED.pack(MAGIC, VERSION, 0, len(header)) + header)
    for array in ordered.values():
        out += bytes(-len(out) % ALIGN)
        out += array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    out += _HASH.pack(kernels.xxh3(out))
    return bytes(out)


def parse_profile(blob: bytes | memoryview, *, profile_id: bytes | None = None) -> Profile:
    """The checked profile that the bytes are, the one of that id if given.

    Raises:
        ContainerError: with the reason (truncated, corrupt, malformed, unknown_version, wrong_key).
    """
    data = memoryview(blob).cast("B").toreadonly()
    if len(data) < _FIXED.size + _HASH.size:
        raise ContainerError(Reason.TRUNCATED, f"{len(data)} bytes are no profile")
    magic, version, zero, header_bytes = _FIXED.unpack_from(data)
    _require(magic == MAGIC and zero == 0, f"magic is {magic!r}; expected {MAGIC!r}")
    if version != VERSION:
        raise ContainerError(Reason.UNKNOWN_VERSION, f"profile version {version}; this build reads {VERSION}")
    _require(header_bytes <= HEADER_BYTES_MAX, f"profile header of {header_bytes} bytes")
    body_end = len(data) - _HASH.size
    if _FIXED.size + header_bytes > body_end:
        raise ContainerError(Reason.TRUNCATED, f"{len(data)} bytes of a profile with a header of {header_bytes}")
    if kernels.xxh3(data[:body_end]) != _HASH.unpack_from(data, body_end)[0]:
        raise ContainerError(Reason.CORRUPT, "profile checksum does not match")
    at = _FIXED.size + header_bytes
    try:
        header = decode_json(data[_FIXED.size : at], _Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ContainerError(Reason.MALFORMED, f"profile header: {error}") from error
    arrays: dict[str, Array] = {}
    for entry in header.arrays:
        at += -at % ALIGN
        _require(entry.name not in arrays, f"two arrays are named {entry.name!r}")
        _require(at + entry.nbytes <= body_end, f"array {entry.name!r} ends behind the profile")
        dtype = np.dtype(entry.dtype).newbyteorder("<")
        flat = np.frombuffer(data[at : at + entry.nbytes] if entry.nbytes else b"", dtype=dtype)
        try:
            arrays[entry.name] = flat.reshape(entry.shape)
        except ValueError as error:
            raise ContainerError(Reason.MALFORMED, f"array {entry.name!r} of shape {entry.shape}") from error
        at += entry.nbytes
    _require(at == body_end, "bytes behind the last array")
    found = hashlib.sha256(data).digest()
    if profile_id is not None and found != profile_id:
        raise ContainerError(Reason.WRONG_KEY, f"profile is {found.hex()[:12]}, asked for {profile_id.hex()[:12]}")
    return Profile(found, header.attributes, arrays, data)


def _require(condition: bool, detail: str) -> None:
    if not condition:
        raise ContainerError(Reason.MALFORMED, detail)
