"""The socket of the service. It is bound before the model is loaded, so that a port in use is reported at once."""

from __future__ import annotations

import ipaddress
import socket

from bfsys.errors import UserError

BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to the address, without listening. Raises UserError for an address that cannot be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a valid name"
        raise UserError(f"--host: {host!r} cannot be resolved: {reason}; use an address of this machine") from None
    # asyncio sets TCP_NODELAY only if the protocol is IPPROTO_TCP. Without it, an answer that is sent in two parts
    # waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise unusable(host, port, error) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def listen(listener: socket.socket, host: str) -> None:
    """Start to listen. Raises UserError if another process has taken the port since it was bound."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise unusable(host, listener.getsockname()[1], error) from None


def unusable(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"{host}:{port}: cannot be used: {error.strerror}; choose another --port or --host (--port 0: any)"
    )
