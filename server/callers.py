"""Access control of callers: the hosts that a request may name, and the web pages that may send one.

A browser lets any page send requests to any server that its machine reaches, so a server on localhost is open to every
page that its user visits. Two headers that no page can forge tell such requests apart: ``Host`` names the site that the
browser believes it talks to (another one after DNS rebinding), ``Origin`` and ``Sec-Fetch-Site`` name the page.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..process.addresses import address_of
from ..protocol.config import Config
from ..protocol.errors import Forbidden, InvalidRequest, Malformed
from .allowed_callers import allowed_hosts, allowed_origins, host_name
from .body_limit import media_type
from .replies import error_reply

ANY = "*"
"""In ``--allowed-hosts``: every host is right."""

_JSON = "application/json"
_OF_BROWSERS = ("origin", "referer", "sec-fetch-site", "sec-fetch-dest")
"""Programs send none of them. Node's ``fetch`` sends ``Accept-Language`` and ``Sec-Fetch-Mode``, as browsers do."""


@dataclass(frozen=True)
class Callers:
    """Loopback names, and the address that a connection came in on, need not be among ``hosts``."""

    hosts: Collection[str]
    origins: Collection[str]
    own_types: Mapping[str, str]
    """Media types of bodies besides JSON, by path."""

    changing_gets: Collection[str] = ()
    """Paths at which a GET changes the server, as a POST does."""

    @classmethod
    def of(cls, config: Config, own_types: Mapping[str, str], changing_gets: Collection[str] = ()) -> Callers:
        """Raises ``StartFailed`` for what is not a host or an origin."""
        return cls(allowed_hosts(config), allowed_origins(config), own_types, changing_gets)

    def check(self, scope: Scope) -> None:
        """Raises ``Forbidden`` for a foreign caller, and ``Malformed`` for a body that a page could send unasked."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_own_host(host, scope):
            raise Forbidden(
                f"This server does not answer as {host[:100]!r}; use a loopback name or the address that it listens "
                "on, or start it with --allowed-hosts."
            )
        self._check_origin(headers, host)
        if scope["path"] in self.changing_gets and scope["method"] == "GET":
            self._check_is_program(headers)
        if "origin" in headers and _has_body(headers):
            self._check_type(media_type(headers), scope["path"])

    def _is_own_host(self, host: str, scope: Scope) -> bool:
        name = host_name(host) or ""
        if name and (ANY in self.hosts or name in self.hosts or name == "localhost"):
            return True
        address = address_of(name)
        connected_to = scope.get("server") or ("", None)
        return address is not None and (address.is_loopback or address == address_of(connected_to[0]))

    def _check_origin(self, headers: Headers, host: str) -> None:
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        if len(origins) == 1 and origins[0] in self.origins:
            return
        for origin in origins:
            if not _is_same(origin.lower(), host.lower(), sites):
                raise Forbidden(
                    f"Web pages of {origin[:100]!r} may not call this server; start it with --cors-origins to let them."
                )
        if not {site.strip().lower() for site in sites} <= {"same-origin", "none"}:
            raise Forbidden(
                "Another site's web page sent this request; start the server with --cors-origins to let it."
            )

    def _check_is_program(self, headers: Headers) -> None:
        """Any page can embed a GET, such as an ``<img>``. To an address that is not loopback, browsers send it with
        neither ``Origin`` nor ``Sec-Fetch-Site``, but no page can hide the browser's name in it."""
        if headers.get("origin") in self.origins:
            return
        if any(name in headers for name in _OF_BROWSERS) or headers.get("user-agent", "").startswith("Mozilla/"):
            raise Forbidden("A GET that changes the server is for programs; from a browser, send a POST.")

    def _check_type(self, kind: str, path: str) -> None:
        types = [_JSON, *([self.own_types[path]] if path in self.own_types else [])]
        if kind not in types:
            raise Malformed(f"A body from a web page needs a Content-Type of {' or '.join(types)}, not {kind[:100]!r}.")


def _is_same(origin: str, host: str, sites: list[str]) -> bool:
    """True for the server's own pages. Behind a TLS proxy, ``Sec-Fetch-Site`` must say so too."""
    return origin == f"http://{host}" or (origin == f"https://{host}" and sites == ["same-origin"])


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip() != "0"


class CallersMiddleware:
    """Keeps foreign callers from every route."""

    def __init__(self, app: ASGIApp, *, callers: Callers) -> None:
        self._app = app
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if _is_ambiguous(Headers(scope=scope), scope["http_version"]):
                await _refuse_ambiguous(scope, receive, send)
                return
            self._callers.check(scope)
        await self._app(scope, receive, send)


def _is_ambiguous(headers: Headers, version: str) -> bool:
    """True if a proxy may have seen another end of the body than this server (RFC 9112, section 6.1)."""
    return "transfer-encoding" in headers and ("content-length" in headers or version == "1.0")


async def _refuse_ambiguous(scope: Scope, receive: Receive, send: Send) -> None:
    """Close the connection too, because the following bytes may belong to this body."""
    error = InvalidRequest("A body has either a Content-Length or, in HTTP/1.1, a Transfer-Encoding.")
    await error_reply(error.info(), {"Connection": "close"})(scope, receive, send)


class CorsMiddleware:
    """Sends CORS headers to listed origins only (Fetch, "CORS protocol")."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        self._app = app
        self._origins = origins
        self._cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "X-Request-Id"),
            allow_private_network=True,
            expose_headers=("*",),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        listed = scope["type"] == "http" and Headers(scope=scope).get("origin") in self._origins
        await (self._cors if listed else self._app)(scope, receive, send)
