"""The server does what its own description says."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.serve.conftest import Server

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")


@pytest.fixture
def api(server: Server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(case) -> None:
    case.call_and_validate(timeout=120)
