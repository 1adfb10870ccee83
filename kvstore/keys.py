"""Names of chunks: chain keys that name a whole prefix, content keys that name a chunk wherever it stands.

A key is the SHA-256 of a fixed, injective encoding; every variable-length field is preceded by its length:

    "kvstore-key-1\\0" | kind u8 | fingerprint 32 | salt len u32, salt | extras len u32, extras
    | parent 32 (zeros at the root; for a content key see `kvstore.spans`) | token count u32 | token ids u32 LE

`salt` separates tenants, `extras` carry whatever else selects the KV (image digests, ...). The golden vectors in
tests/golden/keys.json pin the encoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvstore.errors import SpecError

KEY_BYTES = 32
ROOT = bytes(KEY_BYTES)
"""Parent of the first chunk of a prompt, and preamble of a content key computed behind nothing."""

DEFAULT_CHUNK_TOKENS = 256

_FORMAT = b"kvstore-key-1\0"
_CHAIN = b"\0"
_CONTENT = b"\1"

Tokens = Sequence[int] | npt.NDArray[np.integer]


def encode_extras(extras: Mapping[str, str | bytes | int]) -> bytes:
    """Injective bytes of a mapping: items sorted by name, each name and value with type tag and length."""
    out = bytearray()
    for name in sorted(extras):
        value = extras[name]
        if isinstance(value, bytes):
            tag, data = b"b", value
        elif isinstance(value, str):
            tag, data = b"s", value.encode()
        elif isinstance(value, int) and not isinstance(value, bool):
            tag, data = b"i", str(value).encode()
        else:
            raise SpecError(f"extras[{name!r}] is a {type(value).__name__}; use str, bytes or int")
        raw = name.encode()
        out += len(raw).to_bytes(4, "little") + raw + tag + len(data).to_bytes(4, "little") + data
    return bytes(out)


class KeyScheme:
    """Keys of one (model fingerprint, tenant salt, extras). Cheap to share between threads.

    Args:
        fingerprint: 32 bytes from `kvstore.spec.fingerprint`.
        chunk_tokens: tokens of a full chunk; a shorter tail of a prompt has no key.
        salt: separates tenants; two salts never share a key.
        extras: anything else that selects the KV.

    Raises:
        SpecError: a field has the wrong size or type.
    """

    def __init__(
        self,
        fingerprint: bytes,
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        salt: bytes = b"",
        extras: Mapping[str, str | bytes | int] | None = None,
    ) -> None:
        if len(fingerprint) != KEY_BYTES:
            raise SpecError(f"fingerprint has {len(fingerprint)} bytes; it must have {KEY_BYTES}")
        if chunk_tokens < 1:
            raise SpecError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
        self.fingerprint = fingerprint
        self.chunk_tokens = chunk_tokens
        self.salt = salt
        self.extras = dict(extras or {})
        packed = encode_extras(extras or {})
        tail = len(salt).to_bytes(4, "little") + salt + len(packed).to_bytes(4, "little") + packed
        self._chain = hashlib.sha256(_FORMAT + _CHAIN + fingerprint + tail)
        self._content = hashlib.sha256(_FORMAT + _CONTENT + fingerprint + tail)

    def chain(self, tokens: Tokens, parent: bytes = ROOT) -> list[bytes]:
        """Chain keys of the full chunks of `tokens`, which follow the prefix named `parent`."""
        ids = token_array(tokens)
        keys = []
        for start in range(0, len(ids) - self.chunk_tokens + 1, self.chunk_tokens):
            parent = _key(self._chain, parent, ids[start : start + self.chunk_tokens])
            keys.append(parent)
        return keys

    def content(self, tokens: Tokens, preamble: bytes = ROOT) -> bytes:
        """Content key of one chunk of any length, computed behind the prefix named `preamble`."""
        return _key(self._content, preamble, token_array(tokens))


def token_array(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """Token ids as little-endian uint32. Raises SpecError on ids outside 0..2**32-1 or a wrong shape."""
    ids = np.asarray(tokens)
    if ids.size == 0:
        return np.zeros(0, dtype="<u4")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise SpecError(f"token ids are {ids.dtype} of shape {ids.shape}; give one row of integers")
    if int(ids.min()) < 0 or int(ids.max()) > 0xFFFFFFFF:
        raise SpecError("token ids must be in 0..4294967295")
    return np.ascontiguousarray(ids, dtype="<u4")


def _key(prefix: hashlib._Hash, parent: bytes, ids: npt.NDArray[np.uint32]) -> bytes:
    if len(parent) != KEY_BYTES:
        raise SpecError(f"parent key has {len(parent)} bytes; it must have {KEY_BYTES}")
    digest = prefix.copy()
    digest.update(parent + len(ids).to_bytes(4, "little"))
    digest.update(ids.data)
    return digest.digest()
