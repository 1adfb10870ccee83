"""Pages of SGLang's host cache in a store. Imports nothing of SGLang."""

from __future__ import annotations

from kvstore.client import Client
from kvstore.connectors.pages import OpaquePages

_DOMAIN = b"kvstore-sglang-1\0"


class SGLangPages(OpaquePages):
    """Pages in the store behind `client`. Safe to use from many threads.

    Args:
        client: the store.
        identity: everything but the tokens that decides the bytes of a page.
        durable: whether a put waits until its pages would survive kill -9.
    """

    def __init__(self, client: Client, identity: dict[str, str | bytes | int], *, durable: bool = False) -> None:
        super().__init__(client, _DOMAIN, identity, durable=durable)
