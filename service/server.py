"""The daemon's life: listen, serve, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvstore.config import ServiceConfig
from kvstore.errors import ConfigError
from kvstore.protocol import SESSION_SUFFIX
from kvstore.service.app import make_app
from kvstore.service.daemon import Daemon
from kvstore.service.listening import UnixListener, listen_tcp
from kvstore.store import Store
from kvstore.tenants import TenantConfig

_log = logging.getLogger(__name__)


class Server:
    """Serves `store` between `start` and `stop`; closes neither.

    Args:
        store: what to serve.
        config: where and within which bounds.
        tenants: who share the store.

    Raises:
        ConfigError: the configuration cannot be served.
    """

    def __init__(self, store: Store, config: ServiceConfig, tenants: Mapping[str, TenantConfig] | None = None) -> None:
        if config.port < 0 and not config.socket:
            raise ConfigError("service.port is -1 and service.socket is empty; set one of them")
        self._config = config
        self._tls = _tls_context(config)
        self.daemon = Daemon(store, config, tenants)
        self._runner: web.AppRunner | None = None
        self._unix: list[UnixListener] = []
        self._session_task: asyncio.Task[None] | None = None
        self.port = -1

    async def start(self) -> None:
        """Listen and serve. Raises ConfigError or ServiceError, leaving nothing behind, if an address cannot be had."""
        try:
            await self._listen()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Refuse new requests, let those being served finish within `stop_seconds_max`, drop the rest. Idempotent."""
        self.daemon.inflight.draining = True
        self.daemon.listeners.stop()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._session_task is not None:
            self._session_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._session_task
            self._session_task = None
        for listener in self._unix:
            listener.close()
        self._unix.clear()
        await asyncio.to_thread(self.daemon.workers.close, wait=True)

    async def _listen(self) -> None:
        config = self._config
        self._runner = web.AppRunner(
            make_app(self.daemon),
            access_log=None,
            logger=_http_log(),
            handle_signals=False,
            handler_cancellation=True,
            auto_decompress=False,  # a few kilobytes must not become gigabytes before anybody has looked at them
            shutdown_timeout=config.stop_seconds_max,
        )
        await self._runner.setup()
        if config.socket:
            listener = UnixListener(config.socket, socket.SOCK_STREAM)
            self._unix.append(listener)
            await web.SockSite(self._runner, listener.socket).start()
            _log.info("listening on unix:%s", config.socket)
            if self.daemon.sessions is not None:
                session_listener = UnixListener(config.socket + SESSION_SUFFIX, socket.SOCK_SEQPACKET)
                self._unix.append(session_listener)
                self._session_task = asyncio.create_task(self.daemon.sessions.run(session_listener.socket))
        if config.port >= 0:
            tcp = listen_tcp(config.host, config.port)
            self.port = tcp.getsockname()[1]
            await web.SockSite(self._runner, tcp, ssl_context=self._tls).start()
            host = f"[{config.host}]" if ":" in config.host else config.host
            _log.info("listening on %s://%s:%d", "https" if self._tls is not None else "http", host, self.port)


def serve(store: Store, config: ServiceConfig, tenants: Mapping[str, TenantConfig]) -> int:
    """Serve until SIGTERM or SIGINT, then stop gracefully and close the store; answers the process's exit code.

    Raises:
        ConfigError, ServiceError: it cannot start; the store is closed all the same.
    """
    try:
        asyncio.run(_serve(store, config, tenants))
    finally:
        store.close()
    return 0


async def _serve(store: Store, config: ServiceConfig, tenants: Mapping[str, TenantConfig]) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(store, config, tenants)
    await server.start()
    _log.info("ready")
    try:
        await stopping.wait()
        _log.info("stopping")
    finally:
        await server.stop()


def _http_log() -> logging.Logger:
    """A log for the HTTP layer that nobody can fill by sending what is no HTTP, or by leaving early."""
    log = logging.getLogger("kvstore.service.http")

    def worth_saying(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], (HttpProcessingError, ConnectionError)))

    log.filters[:] = [worth_saying]
    return log


def _tls_context(config: ServiceConfig) -> ssl.SSLContext | None:
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"service.tls_cert {config.tls_cert}, service.tls_key {config.tls_key}: {error}") from error
    return context
