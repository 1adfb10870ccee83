"""What the handlers share: the store, the bounds, the sessions."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from kvstore.config import ServiceConfig
from kvstore.hash_index import HashIndex
from kvstore.service.auth import Gate, read_token
from kvstore.service.limits import Inflight, Listeners, Workers
from kvstore.service.metrics import Metrics
from kvstore.service.refusal import RefusalError
from kvstore.service.session import Session, SessionServer, SharedMemory
from kvstore.sizes import parse_bytes
from kvstore.span_planner import SpanPlanner
from kvstore.store import Store
from kvstore.tenants import TenantConfig


class Daemon:
    """A store being served.

    Args:
        store: every decision is its.
        config: the bounds.
        tenants: who share the store.

    Raises:
        ConfigError: the token file cannot be used, or is missing where one is needed.
    """

    def __init__(self, store: Store, config: ServiceConfig, tenants: Mapping[str, TenantConfig] | None = None) -> None:
        self.store = store
        self.planner = SpanPlanner(store)
        self.hashes = HashIndex(store.tiers, store.events.ring)
        self.config = config
        self.request_bytes_max = parse_bytes(config.request_bytes_max, "service.request_bytes_max")
        tokens = {
            name: read_token(tenant.token_file, f"tenants.{name}.token_file") if tenant.token_file else None
            for name, tenant in (tenants or {}).items()
        }
        self.gate = Gate(read_token(config.token_file) if config.token_file else None, config.host, tokens)
        self.inflight = Inflight(config.inflight_max)
        self.listeners = Listeners(config.event_listeners_max)
        self.workers = Workers(config.inflight_max)
        self.sessions = self._session_server()
        self.metrics = Metrics(
            store.stats,
            inflight=lambda: self.inflight.requests,
            sessions=lambda: len(self.sessions) if self.sessions is not None else 0,
            listeners=lambda: len(self.listeners),
            spans=self.planner.stats,
        )

    @property
    def memory_name(self) -> str:
        """Name of the tier whose arena clients map; "" if there is none."""
        return self.store.memory.name if self.store.memory is not None else ""

    def session(self, name: str | None) -> Session:
        """The session a request names. Raises RefusalError (409) if there is none."""
        if self.sessions is None:
            raise RefusalError(409, "no_session", "this daemon shares no memory; use transport bytes")
        return self.sessions.get(name)

    def _session_server(self) -> SessionServer | None:
        arena: SharedMemory | None = getattr(self.store.memory, "arena", None)
        if arena is None or not self.config.socket:
            return None
        return SessionServer(
            self.store,
            arena,
            staging_bytes_max=parse_bytes(self.config.session_staging_bytes_max, "service.session_staging_bytes_max"),
            lease_ttl_seconds=self.config.lease_ttl_seconds,
        )


DAEMON = web.AppKey("DAEMON", Daemon)
