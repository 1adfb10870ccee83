"""The HTTP application: routes, and what every request passes through."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import NamedTuple

from aiohttp import hdrs, web

from kvstore.errors import ConfigError
from kvstore.service import chunks, control, events, fetching, indexer, plans, prompts, verifying
from kvstore.service.daemon import DAEMON, Daemon
from kvstore.service.refusal import RefusalError, json_response

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    """One verb. `public` ones need no token; `unlimited` ones are served even when the daemon is full or stopping."""

    method: str
    path: str
    handler: Handler
    verb: str
    public: bool = False
    unlimited: bool = False


async def health(request: web.Request) -> web.Response:
    """Live, and whether ready to serve."""
    ready = not request.app[DAEMON].inflight.draining
    return json_response({"live": True, "ready": ready}, status=200 if ready else 503)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    return web.Response(
        body=request.app[DAEMON].metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    )


async def openapi(request: web.Request) -> web.Response:
    """The description of this interface."""
    text = resources.files("kvstore.service").joinpath("static/openapi.yaml").read_bytes()
    return web.Response(body=text, content_type="application/yaml")


JSON_BYTES_MAX = 16 << 20
"""Bound of a JSON body; chunks themselves are streamed and have a bound of their own."""

CHUNK_PATH = "/v1/chunks/{key}"
ROUTES = (
    Route("POST", "/v1/lookup", prompts.lookup, "lookup"),
    Route("POST", "/v1/explain", prompts.explain, "explain"),
    Route("POST", "/v1/plan", plans.plan, "plan"),
    Route("POST", "/v1/plan_batch", plans.batch, "plan_batch"),
    Route("POST", "/v1/head", control.head, "head"),
    Route("POST", "/query", indexer.query, "query"),
    Route("POST", "/query_by_hash", indexer.query_by_hash, "query_by_hash"),
    Route("POST", "/v1/fetch", fetching.fetch, "fetch"),
    Route("POST", "/v1/put", control.put, "put"),
    Route("POST", "/v1/prefetch", control.prefetch, "prefetch"),
    Route("POST", "/v1/cancel", control.cancel, "cancel"),
    Route("POST", "/v1/park", control.park, "park"),
    Route("POST", "/v1/resume", control.resume, "resume"),
    Route("POST", "/v1/pin", control.pin, "pin"),
    Route("POST", "/v1/unpin", control.unpin, "unpin"),
    Route("POST", "/v1/delete", control.delete, "delete"),
    Route("POST", "/v1/flush", control.flush, "flush"),
    Route("POST", "/v1/verify", verifying.verify, "verify"),
    Route("GET", CHUNK_PATH, chunks.get, "chunk_get"),
    Route("HEAD", CHUNK_PATH, chunks.head, "chunk_head"),
    Route("PUT", CHUNK_PATH, chunks.put, "chunk_put"),
    Route("DELETE", CHUNK_PATH, chunks.delete, "chunk_delete"),
    Route("GET", "/v1/info", control.info, "info"),
    Route("GET", "/v1/stats", control.stats, "stats"),
    Route("GET", "/v1/events", events.events, "events", unlimited=True),
    Route("GET", "/metrics", metrics, "metrics", unlimited=True),
    Route("GET", "/health", health, "health", public=True, unlimited=True),
    Route("GET", "/openapi.yaml", openapi, "openapi", public=True),
)


def make_app(daemon: Daemon) -> web.Application:
    """The application that serves `daemon`."""
    app = web.Application(middlewares=[_errors], client_max_size=min(daemon.request_bytes_max, JSON_BYTES_MAX))
    app[DAEMON] = daemon
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _guarded(daemon, route))
    return app


def _guarded(daemon: Daemon, route: Route) -> Handler:
    """The handler behind authorisation and limits, timed."""

    async def handle(request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        status = 499  # the client has gone
        try:
            daemon.gate.check(request, public=route.public)
            if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
                raise RefusalError(415, "encoding", "bodies are taken as they are, not compressed", "Content-Encoding")
            if route.unlimited:
                response = await route.handler(request)
            else:
                with daemon.inflight.admit():
                    response = await route.handler(request)
            status = response.status
            return response
        except RefusalError as refusal:
            status = refusal.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            daemon.metrics.observe(route.verb, status, time.perf_counter() - started)

    return handle


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in the one shape."""
    try:
        return await handler(request)
    except RefusalError as refusal:
        return refusal.response()
    except web.HTTPException as error:
        return RefusalError(error.status, "http", f"{request.method} {request.path[:200]}: {error.reason}").response()
    except ConfigError as error:
        return RefusalError(400, "invalid", str(error)).response()
    except web.RequestPayloadError as error:
        return RefusalError(400, "invalid", f"request body: {' '.join(str(error).split())}").response()
    except ConnectionError as error:
        _log.info("%s %s ended early: %s", request.method, request.path, error)
        raise
    except Exception:
        _log.exception("%s %s failed", request.method, request.path)
        return RefusalError(500, "internal", "the daemon failed to serve this request; its log says why").response()
