"""Pages that an engine names and keeps as bytes of its own form, in a store: names, containers, blocking verbs.

The engine names a page by a hash of the tokens up to its end, and keeps it as one or more spans of memory. Here the
name, and everything else that decides the bytes, become a chunk key, and the spans one segment of codec id `opaque`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import msgspec

from kvstore.client import Client, Part
from kvstore.connectors.objects import check_lease, fetch_objects, put_objects
from kvstore.connectors.opaque import NO_KV, put_opaque, read_opaque
from kvstore.container import ChunkMeta, expect
from kvstore.errors import ContainerError
from kvstore.keys import encode_extras
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.spec import fingerprint

Spans = tuple[memoryview, ...]


class Page(msgspec.Struct, frozen=True):
    """One page: the engine's name of it, and its bytes where they lie in the engine's memory, span after span."""

    name: str
    spans: Spans

    @property
    def nbytes(self) -> int:
        """Bytes of all spans."""
        return sum(len(span) for span in self.spans)


class OpaquePages:
    """Pages in the store behind `client`. Safe to use from many threads.

    Args:
        client: the store.
        domain: sets the keys of one connector apart from those of all others.
        identity: everything but the tokens that decides the bytes of a page.
        durable: whether a put waits until its pages would survive kill -9.
    """

    def __init__(
        self, client: Client, domain: bytes, identity: dict[str, str | bytes | int], *, durable: bool = False
    ) -> None:
        self.client = client
        self.durable = durable
        self._domain = domain
        self._identity = hashlib.sha256(domain + encode_extras(identity)).digest()

    def key(self, name: str) -> bytes:
        """The chunk key of a page."""
        return hashlib.sha256(self._domain + self._identity + name.encode()).digest()

    def store(self, pages: Sequence[Page], *, deadline_ms: float) -> list[PutStatus]:
        """Put pages; one status each. What finds memory full is put again while that helps."""
        return put_objects(
            self.client,
            len(pages),
            lambda index: put_opaque(self._meta(pages[index]), pages[index].spans),
            durable=self.durable,
            deadline=time.monotonic() + deadline_ms / 1e3,
        )

    def load(self, pages: Sequence[Page], *, deadline_ms: float) -> list[Miss | None]:
        """Fill the spans of pages, every byte verified; None for those that are whole, else the reason.

        Spans whose page missed hold unspecified bytes. A page that cannot be served is deleted.
        """
        keys = [self.key(page.name) for page in pages]
        return fetch_objects(
            self.client, keys, lambda index, part: self._read(part, pages[index]), deadline_ms=deadline_ms
        )

    def leading(self, names: Sequence[str]) -> int:
        """How many pages from the first one on are there."""
        found = self.exist(names)
        return next((index for index, there in enumerate(found) if not there), len(found))

    def exist(self, names: Sequence[str]) -> list[bool]:
        """Whether each page is there."""
        return [info is not None for info in self.client.head([self.key(name) for name in names])]

    def _meta(self, page: Page) -> ChunkMeta:
        identity = fingerprint(NO_KV, self._identity, settings={"opaque_bytes": page.nbytes})
        return ChunkMeta(fingerprint=identity, key=self.key(page.name), spec=NO_KV, tokens=1)

    def _read(self, part: Part, page: Page) -> None:
        """Fill a page from one part. Raises ContainerError with the reason."""
        if part.header is None:
            raise ContainerError(Reason.MALFORMED, "the store answered a chunk without its header")
        meta = self._meta(page)
        expect(part.header, key=meta.key, fingerprint=meta.fingerprint)
        read_opaque(part, page.spans)
        check_lease(part)
