"""Who may talk to the explorer: pages that came from it, under a name that is this machine's."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

# gradio starts itself from inline scripts and compiles templates; nothing may come from, or go to, anywhere else.
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Sent with every answer."""


class Guard:
    """An ASGI application that lets only its own pages through to another one.

    A page of some other site cannot read our answers, but it can send requests to 127.0.0.1; and after its name was
    bound to 127.0.0.1 ("DNS rebinding") a browser takes it for ours. Both give themselves away by their headers: by a
    Host that is not this machine's, or by an Origin that is not the Host.

    Args:
        application: What is guarded.
        hosts: Names that are this machine's, without a port.
        any_address: Also admit every bare IP address, for a server that was opened to a network on purpose. No name
            can be bound to it: a browser that sends an address as Host has no other site's page.

    Example:
        >>> guard = Guard(None, LOOPBACK)
        >>> guard.refusal({"host": "localhost:7860"}, "GET"), guard.refusal({"host": "evil.example"}, "GET")
        ('', "host 'evil.example' is not this machine")
    """

    def __init__(self, application: Any, hosts: frozenset[str] = LOOPBACK, any_address: bool = False) -> None:
        self.application, self.hosts, self.any_address = application, hosts, any_address

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        reason = self.refusal(headers, scope.get("method", "WEBSOCKET"))
        if reason:
            await _refuse(scope, send, reason)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                theirs = [
                    pair for pair in message.get("headers", []) if pair[0].decode().lower() not in HEADERS
                ]
                message = {**message, "headers": theirs + ours}
            await send(message)

        await self.application(scope, receive, send_guarded)

    def refusal(self, headers: MutableMapping[str, str], method: str) -> str:
        """Why a request is refused, or an empty text if it is not.

        Args:
            headers: By lower-case name.
            method: "GET", "POST", ...; anything else for a web socket.
        """
        host = headers.get("host", "")
        if not self._ours(host):
            return f"host {host[:80]!r} is not this machine"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return f"origin {origin[:80]!r} is not this page"
        site = headers.get("sec-fetch-site", "none")
        followed = method == "GET" and headers.get("sec-fetch-mode") == "navigate"  # a link, typed or clicked
        if site not in ("none", "same-origin") and not followed:
            return f"the request comes from another page ({site[:20]})"
        return ""

    def _ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address


async def _refuse(scope: Message, send: Send, reason: str) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = f"refused: {reason}\n".encode("ascii", "backslashreplace")
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
