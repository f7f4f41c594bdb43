"""The rules for every request: access, headers of answers, counting, and errors without their messages.

A service on a loopback address trusts the programs of its machine, but a browser on this machine also runs pages of
other sites. Such pages may send forms to the service (CSRF) or, under a name that resolves to 127.0.0.1, read its
answers (DNS rebinding). Requests from another site are therefore refused by the headers that browsers set and pages
cannot change, and requests under another name are refused by their Host header. Other programs do not send the headers
of browsers and use the service's own name, so they are not affected.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
import traceback
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bfsys.serve.metrics import Metrics

CLIENT_GONE = 499  # nginx' status of a request whose client closed the connection
OWN_SITE = ("same-origin", "none")  # none: typed into the address bar
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application around another one. Requests to `paths` are counted by path."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Iterable[str], hosts: list[str] | None) -> None:
        """`hosts` are the allowed host names; None allows any."""
        self._app, self._hosts = app, hosts
        self._metrics, self._paths = metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        _resolve_absolute_form(scope)
        started, status = time.monotonic(), CLIENT_GONE

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            answer = self._refusal(scope["method"], Headers(scope=scope)) or self._app
            await answer(scope, receive, send_on)
        except asyncio.CancelledError:  # a stop that does not wait for requests
            if status == CLIENT_GONE:
                await JSONResponse({"detail": "the service has stopped"}, 503)(scope, receive, send_on)
        except Exception as error:
            log(error)
            if status == CLIENT_GONE:
                await JSONResponse({"detail": "internal error"}, 500)(scope, receive, send_on)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _refusal(self, method: str, headers: Headers) -> JSONResponse | None:
        """The answer to a request that is refused; None for others."""
        host = headers.get("host", "")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            names = ", ".join(dict.fromkeys(self._hosts))
            detail = f"Host: got {host[:100]!r}; allowed are {names}, and a proxy must send one of them"
            return JSONResponse({"detail": detail}, 400)
        if method not in ("GET", "HEAD") and _is_of_another_site(headers):
            return JSONResponse({"detail": "requests from pages of other sites are refused"}, 403)
        return None


def _resolve_absolute_form(scope: Scope) -> None:
    """Rewrite `GET http://HOST/PATH`, as clients may write `GET /PATH`. HOST then counts in place of the header Host
    (RFC 9112, 3.2.2)."""
    if found := re.fullmatch(r"https?://([^/?#]*)(.*)", scope["path"], re.IGNORECASE | re.DOTALL):
        scope["path"] = found[2] or "/"
        scope["raw_path"] = scope["path"].encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [*headers, (b"host", found[1].encode())]


def _name_of(host: str) -> str | None:
    """The name in a Host header, without the port; None if there is none."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:\d*)?", host.lower(), re.ASCII)
    return match[1] if match else None


def _is_of_another_site(headers: Headers) -> bool:
    """Whether a page of another site sent the request. Browsers send Sec-Fetch-Site to loopback addresses and over
    HTTPS; otherwise they send only Origin."""
    if site := headers.get("sec-fetch-site"):
        return site not in OWN_SITE
    origin = headers.get("origin")
    try:
        return origin is not None and urlsplit(origin).netloc != headers.get("host")
    except ValueError:  # not a URL
        return True


def log(error: BaseException) -> None:
    """Print the place and type of an error to standard error, without its message, which may quote a file."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"internal error: {type(error).__name__}\n{frames}", end="", file=sys.stderr, flush=True)
