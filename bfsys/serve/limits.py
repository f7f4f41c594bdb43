"""Limits of one request. They are enforced while a request arrives, before its bytes are stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The service holds at most `requests` × `request_bytes` bytes of uploads at a time."""

    file_bytes: int = 10_000_000
    """Largest size of one file in a request."""
    request_bytes: int = 20_000_000
    """Largest size of a whole body, including the multipart headers."""
    files: int = 100
    """Largest number of files in one request."""
    requests: int = 64
    """Largest number of requests in progress. Further requests are refused with status 503."""
    seconds: float = 30.0
    """Longest time from the head of a request to its answer."""
    model_bytes: int | None = None
    """Largest size of one file after it is encoded and transformed. Its cost grows with this size, and a batch that is
    being computed cannot be interrupted. None: data.eval_batch_bytes of the run, or the longest file for which the
    model has a position per token, if that is longer."""
