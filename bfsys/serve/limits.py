"""What one client may ask of the service. All bounds hold while a request arrives, before its bytes are kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The service holds at most `requests` × `request_bytes` bytes of uploads at a time."""

    file_bytes: int = 10_000_000
    """Of one file as it is sent."""
    request_bytes: int = 20_000_000
    """Of a whole body, with what multipart adds."""
    files: int = 100
    """In one request."""
    requests: int = 64
    """That are received, waiting or computed at the same time; others are refused with status 503."""
    seconds: float = 30.0
    """From the head of a request to its answer."""
    model_bytes: int | None = None
    """Of one file as the model reads it, after it is encoded and transformed: what it costs grows with these, and a
    batch that is being computed cannot be interrupted. None: data.eval_batch_bytes of the run, or the longest file of
    which the model knows each position, if that is longer."""
