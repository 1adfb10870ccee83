"""LMCache's objects in a store: names, containers, and the blocking verbs that both LMCache adapters are made of.

LMCache names an object by a string, `model@kv_rank@object_group@chunk_hash[@cache_salt]`, and moves it as bytes. Here
the string becomes a chunk key and the bytes a container. Where LMCache says what the bytes are (K and V of a chunk's
layers in a floating-point type), the container has that geometry, so that every exact codec applies to it on its way
down; the heads of a layer are not told apart, LMCache has them as one vector. Other bytes are one segment of codec id
`opaque`.

A model is a name to LMCache, not a digest of its weights. `namespace` separates what the name does not: revisions,
adapters, engine settings.

Imports nothing of LMCache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np

from kvstore.chunk import check_coverage
from kvstore.chunk_put import chunk_put
from kvstore.client import Client, Part, PutChunk
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connectors.objects import check_lease, fetch_objects, milliseconds_until, put_objects
from kvstore.connectors.opaque import NO_KV, put_opaque, read_opaque
from kvstore.container import FLAG_FROM_LOSSY, ChunkMeta, expect
from kvstore.errors import CodecError, ConfigError, ContainerError, SpecError
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.spec import ITEMSIZE, DType, KVArrays, KVSpec, Rope, fingerprint

_DOMAIN = b"kvstore-lmcache-1\0"
_DTYPES: dict[str, DType] = {
    "float8_e4m3fn": "float8_e4m3",
    "float8_e5m2": "float8_e5m2",
    **{name: cast(DType, name) for name in ITEMSIZE},
}


class Geometry(msgspec.Struct, frozen=True):
    """K and V of `tokens` tokens in LMCache's order: K of every layer, then V of every layer; token, then dimension.

    For latent attention there is one such half, K.
    """

    spec: KVSpec
    tokens: int

    def arrays(self, view: memoryview) -> KVArrays:
        """Views of every layer's K and V in an object's bytes."""
        layers, dim = self.spec.layers, self.spec.key_dim
        halves = np.frombuffer(view, dtype=self.spec.bit_dtype).reshape(-1, layers, 1, self.tokens, dim)
        if self.spec.attention == "mla":
            nothing = halves[0, 0, :, :, :0]
            return [(halves[0, layer], nothing) for layer in range(layers)]
        return [(halves[0, layer], halves[1, layer]) for layer in range(layers)]


def geometry_of(shape: Sequence[int], dtype: str, nbytes: int) -> Geometry | None:
    """The geometry of an object of `shape` (2, layers, tokens, dim), or (1, ...) for latent attention; else None.

    Args:
        shape: as LMCache has it.
        dtype: name of the element type, such as bfloat16.
        nbytes: bytes of the object.
    """
    if dtype not in _DTYPES or len(shape) != 4 or shape[0] not in (1, 2):
        return None
    halves, layers, tokens, dim = shape
    try:
        spec = KVSpec(
            layers=layers,
            kv_heads=1,
            key_dim=dim,
            value_dim=dim if halves == 2 else 0,
            dtype=_DTYPES[dtype],
            rope=Rope(kind="unknown"),
            attention="mha" if halves == 2 else "mla",
        )
        ChunkMeta(fingerprint=bytes(32), key=bytes(32), spec=spec, tokens=tokens)
    except SpecError:
        return None
    return Geometry(spec, tokens) if spec.chunk_bytes(tokens) == nbytes else None


class LMCacheObject(msgspec.Struct, frozen=True):
    """One object: LMCache's name, its bytes in LMCache's memory, and what they are (None: unknown)."""

    name: str
    view: memoryview
    geometry: Geometry | None = None


class LMCacheObjects:
    """Objects of LMCache in the store behind `client`. Safe to use from many threads.

    Args:
        client: the store.
        namespace: part of every key.
        codec: how to write objects whose geometry is known; "" for what the store asks for, else raw.
        durable: whether a put waits until its objects would survive kill -9.

    Raises:
        ConfigError: there is no such codec, or it is not exact.
    """

    def __init__(self, client: Client, *, namespace: str = "", codec: str = "", durable: bool = False) -> None:
        self.client = client
        self.durable = durable
        self._namespace = namespace.encode()
        self._codec = _exact_codec(codec) if codec else _wished_codec(client.put_codec)

    def key(self, name: str) -> bytes:
        """The chunk key of an object."""
        return self._digest(b"key", name)

    def store(self, objects: Sequence[LMCacheObject], *, deadline: float) -> list[PutStatus]:
        """Put objects; one status each. `deadline` is in time.monotonic seconds.

        What finds memory full is put again once what was put before has gone down, for as long as that helps.
        """
        return put_objects(
            self.client,
            len(objects),
            lambda index: self._put(objects[index]),
            durable=self.durable,
            deadline=deadline,
        )

    def load(self, objects: Sequence[LMCacheObject], *, deadline: float) -> list[Miss | None]:
        """Fill the views of objects, every byte verified; None for those that are whole, else the reason.

        A view whose object missed holds unspecified bytes. What is stored under the name and cannot be served, now or
        later, is deleted, so that the next store replaces it.
        """
        remaining_ms = milliseconds_until(deadline)
        if remaining_ms <= 0:
            return [Miss(Reason.DEADLINE, "not read by the deadline")] * len(objects)
        keys = [self.key(item.name) for item in objects]
        return fetch_objects(
            self.client,
            keys,
            lambda index, part: self._decode(part, objects[index], keys[index]),
            deadline_ms=remaining_ms,
        )

    def lock(self, names: Sequence[str], *, ttl_seconds: float) -> list[bool]:
        """Keep objects from eviction for a while; True where there is one."""
        return self.client.pin([self.key(name) for name in names], ttl_seconds=ttl_seconds)

    def unlock(self, names: Sequence[str]) -> None:
        """End what `lock` began."""
        self.client.unpin([self.key(name) for name in names])

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Whether each object is there."""
        return [info is not None for info in self.client.head([self.key(name) for name in names])]

    def delete(self, names: Sequence[str]) -> list[bool]:
        """Remove objects; True where there was one."""
        return self.client.delete([self.key(name) for name in names])

    def _digest(self, what: bytes, text: str) -> bytes:
        digest = hashlib.sha256(_DOMAIN + what + b"\0" + len(self._namespace).to_bytes(4, "little") + self._namespace)
        digest.update(text.encode())
        return digest.digest()

    def _meta(self, item: LMCacheObject) -> ChunkMeta:
        """What the container of an object says; the fingerprint has the model's name and what the bytes are."""
        spec, tokens = (NO_KV, 1) if item.geometry is None else (item.geometry.spec, item.geometry.tokens)
        settings = {"opaque_bytes": len(item.view) if item.geometry is None else 0}
        model = self._digest(b"model", item.name.partition("@")[0])
        return ChunkMeta(
            fingerprint=fingerprint(spec, model, settings=settings), key=self.key(item.name), spec=spec, tokens=tokens
        )

    def _put(self, item: LMCacheObject) -> PutChunk:
        meta, geometry = self._meta(item), item.geometry
        if geometry is not None:
            arrays = geometry.arrays(item.view)
            try:
                return chunk_put(self._codec, meta, lambda: arrays)
            except CodecError:  # a geometry that this codec does not serve
                return chunk_put(registry.get("raw"), meta, lambda: arrays)
        return put_opaque(meta, (item.view,))

    def _decode(self, part: Part, item: LMCacheObject, key: bytes) -> None:
        """Fill an object's view from one part. Raises ContainerError with the reason."""
        header = part.header
        if header is None:
            raise ContainerError(Reason.MALFORMED, "the store answered a chunk without its header")
        meta = self._meta(item)
        expect(header, key=key, fingerprint=meta.fingerprint)
        if header.meta.tokens != meta.tokens or header.meta.flags & FLAG_FROM_LOSSY:
            raise ContainerError(Reason.MALFORMED, "the container is of another size, or not exact")
        if item.geometry is None:
            read_opaque(part, (item.view,))
        else:
            codec = registry.get(header.codec, header.profile)
            if not codec.exact or len(part.groups) != len(header.groups()):
                raise ContainerError(Reason.MALFORMED, f"the chunk is in codec {codec.id}, or not whole")
            check_coverage(header)
            arrays = item.geometry.arrays(item.view)
            for group in part.groups:
                codec.decode(group, arrays, meta.spec)
        check_lease(part)


def _exact_codec(codec_id: str) -> Codec:
    try:
        codec = registry.get(codec_id)
    except ContainerError as error:
        raise ConfigError(f"codec: {error.detail}") from error
    if not codec.exact:
        raise ConfigError(
            f"codec is {codec_id!r}, which is lossy; LMCache's keys say nothing of codecs: use an exact one"
        )
    return codec


def _wished_codec(codec_id: str) -> Codec:
    """The codec that the store asks writers for, if it is exact; else raw."""
    return registry.get(codec_id if codec_id and registry.is_exact(codec_id) else "raw")
