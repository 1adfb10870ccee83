"""Who may ask: bearer tokens on TCP, file permissions on the UNIX socket, and the Host header against rebinding."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import stat
from pathlib import Path

from aiohttp import hdrs, web

from kvstore.errors import ConfigError
from kvstore.service.refusal import RefusalError

TOKEN_CHARACTERS_MIN = 16


def read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file that only its owner can read.

    Raises:
        ConfigError: there is no such file, others can read it, or what it holds is no token.
    """
    try:
        mode = os.stat(path).st_mode
        text = Path(path).read_text("ascii").strip()
    except OSError as error:
        raise ConfigError(f"service.token_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"service.token_file {path} is not ASCII text; write a random token into it") from error
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise ConfigError(f"service.token_file {path} can be read by others; run: chmod 600 {path}")
    if len(text) < TOKEN_CHARACTERS_MIN or not text.isprintable() or " " in text:
        raise ConfigError(
            f"service.token_file {path} holds no token of at least {TOKEN_CHARACTERS_MIN} characters without spaces"
        )
    return text


def is_loopback(host: str) -> bool:
    """True if `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Lets requests in or refuses them.

    Args:
        token: what TCP requests must carry; None lets everyone on this machine in.
        host: the address listened on.

    Raises:
        ConfigError: other machines could reach the daemon without a token.
    """

    def __init__(self, token: str | None, host: str) -> None:
        if token is None and not is_loopback(host):
            raise ConfigError(f"service.host {host} can be reached from other machines; set service.token_file")
        self._token = token.encode() if token is not None else None
        self._host = host if is_loopback(host) else None

    def check(self, request: web.Request, *, public: bool) -> None:
        """Raise RefusalError unless the request may pass. `public` paths need no token."""
        if came_over_unix(request):
            return
        if self._host is not None and not self._names_this_host(request.headers.get(hdrs.HOST, "")):
            raise RefusalError(403, "host", "the Host header does not name this machine", hdrs.HOST)
        if self._token is None or public:
            return
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            raise RefusalError(401, "unauthorised", "the bearer token is missing or wrong", hdrs.AUTHORIZATION)

    def _names_this_host(self, header: str) -> bool:
        # A page in a browser can make its own name resolve to 127.0.0.1; then the Host header still says that name.
        name = (
            header[: header.rindex("]") + 1] if header.startswith("[") and "]" in header else header.partition(":")[0]
        )
        return name == self._host or is_loopback(name)


def came_over_unix(request: web.Request) -> bool:
    """True if the request came over the UNIX socket, whose file permissions say who may."""
    transport = request.transport
    sock = transport.get_extra_info("socket") if transport is not None else None
    return sock is not None and sock.family == socket.AF_UNIX
