"""Who may ask: bearer tokens on TCP, file permissions on the UNIX socket, and the Host header against rebinding."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

from aiohttp import hdrs, web

from kvstore.errors import ConfigError
from kvstore.service.refusal import RefusalError
from kvstore.tenants import TENANT_HEADER

TOKEN_CHARACTERS_MIN = 16


def read_token(path: str | os.PathLike[str], field: str = "service.token_file") -> str:
    """The token in a file, named by the setting `field`, that only its owner can read.

    Raises:
        ConfigError: there is no such file, others can read it, or what it holds is no token.
    """
    try:
        mode = os.stat(path).st_mode
        text = Path(path).read_text("ascii").strip()
    except OSError as error:
        raise ConfigError(f"{field} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field} {path} is not ASCII text; write a random token into it") from error
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise ConfigError(f"{field} {path} can be read by others; run: chmod 600 {path}")
    if len(text) < TOKEN_CHARACTERS_MIN or not text.isprintable() or " " in text:
        raise ConfigError(f"{field} {path} holds no token of at least {TOKEN_CHARACTERS_MIN} characters without spaces")
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
        token: what TCP requests must carry; None if there is none but the tenants'.
        host: the address listened on.
        tenants: each tenant's own token, None for one without. With no token at all everyone on this machine may.

    Raises:
        ConfigError: other machines could reach the daemon without a token, or a token is used twice.
    """

    def __init__(self, token: str | None, host: str, tenants: Mapping[str, str | None] | None = None) -> None:
        self._tenants = frozenset(tenants or ())
        given = [("", token), *(tenants or {}).items()]
        self._tokens = [(name, secret.encode()) for name, secret in given if secret is not None]
        if len({secret for _, secret in self._tokens}) < len(self._tokens):
            raise ConfigError("two token files hold the same token; write another one into one of them")
        if not self._tokens and not is_loopback(host):
            raise ConfigError(f"service.host {host} can be reached from other machines; set service.token_file")
        self._host = host if is_loopback(host) else None

    def check(self, request: web.Request, *, public: bool) -> None:
        """Raise RefusalError unless the request may pass. `public` paths need no token."""
        self._tenant(request, public=public)

    def tenant_of(self, request: web.Request) -> str:
        """The tenant that asks, "" for nobody in particular, in a request that needs a token where there are any.

        A tenant's token says who asks; else the header does, which whoever has the service's token or reaches the
        socket may fill in.
        """
        return self._tenant(request, public=False)

    def _tenant(self, request: web.Request, *, public: bool) -> str:
        bound = "" if came_over_unix(request) else self._bearer(request, public=public)
        named = request.headers.get(TENANT_HEADER, "")
        if bound and named not in ("", bound):
            raise RefusalError(403, "tenant", f"the bearer token is tenant {bound}'s", TENANT_HEADER)
        if named and named not in self._tenants:
            detail = f"there is no tenant {named!r:.80}; add [tenants.NAME] to the daemon's configuration"
            raise RefusalError(400, "tenant", detail, TENANT_HEADER)
        return bound or named

    def _bearer(self, request: web.Request, *, public: bool) -> str:
        """Whose token a TCP request carries, "" for the service's own."""
        if self._host is not None and not self._names_this_host(request.headers.get(hdrs.HOST, "")):
            raise RefusalError(403, "host", "the Host header does not name this machine", hdrs.HOST)
        if not self._tokens or public:
            return ""
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        # Every token is compared, so that the time taken does not tell which of them was nearly right.
        # What is no UTF-8 comes as lone surrogates, which only "surrogateescape" turns into bytes again.
        secret = given.strip().encode(errors="surrogateescape")
        right = [name for name, token in self._tokens if hmac.compare_digest(secret, token)]
        if scheme.lower() != "bearer" or not right:
            raise RefusalError(401, "unauthorised", "the bearer token is missing or wrong", hdrs.AUTHORIZATION)
        return right[0]

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
