"""Requests to a server. httpx waits for 5 s by default, which a busy machine exceeds; these wait for LIMIT_S."""

from __future__ import annotations

import functools

import pytest

from tests.serve.conftest import LIMIT_S

httpx = pytest.importorskip("httpx")
get, head, post, request = (
    functools.partial(method, timeout=LIMIT_S) for method in (httpx.get, httpx.head, httpx.post, httpx.request)
)
