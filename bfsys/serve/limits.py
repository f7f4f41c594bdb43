"""What one client may ask of the service. All bounds hold while a request arrives, before its bytes are kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The service holds at most `requests` × `request_bytes` bytes of uploads at a time."""

    file_bytes: int = 10_000_000
    request_bytes: int = 20_000_000
    """Of a whole body, with what multipart adds."""
    files: int = 100
    """In one request."""
    requests: int = 64
    """That are received, waiting or computed at the same time; others are refused with status 503."""
    seconds: float = 30.0
    """From the head of a request to its answer."""
