"""A request the daemon does not serve: one exception, one JSON shape."""

from __future__ import annotations

import msgspec
from aiohttp import web

from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.protocol import ErrorBody, ErrorReply, StatusesReply

_STATUS = {
    Reason.ABSENT: 404,
    Reason.PARENT_ABSENT: 404,
    Reason.DEADLINE: 504,
    Reason.BUSY: 503,
    Reason.UNAVAILABLE: 503,
    Reason.FULL: 507,
    Reason.OVER_QUOTA: 507,
    Reason.TOO_LARGE: 413,
}
_RETRY_SECONDS = {429: 1, 503: 1, 507: 1}
_RETRY_REASONS = frozenset({Reason.BUSY, Reason.FULL, Reason.OVER_QUOTA})


class RefusalError(Exception):
    """Raised by a handler; becomes `{"error": {"code", "message", "field"?}}` with that status."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        # A name from aiohttp.hdrs is a subclass of str, which does not encode.
        self.body = ErrorReply(ErrorBody(code, message, None if field is None else str(field)))

    def response(self) -> web.Response:
        """The answer to send."""
        headers = {"Retry-After": str(_RETRY_SECONDS[self.status])} if self.status in _RETRY_SECONDS else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body, status=self.status, headers=headers)


def missed(miss: Miss) -> RefusalError:
    """The refusal for a chunk that cannot be served; its code is the miss's reason."""
    return RefusalError(_STATUS.get(miss.reason, 502), str(miss.reason), miss.detail or str(miss.reason))


def put_response(statuses: list[PutStatus]) -> web.Response:
    """The answer to puts; with Retry-After if some were refused because a bound had been reached."""
    retry = any(status.reason in _RETRY_REASONS for status in statuses)
    return json_response(StatusesReply(statuses), headers={"Retry-After": "1"} if retry else None)


def json_response(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers)
