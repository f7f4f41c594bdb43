"""The server does what its own description says."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.conftest import LIMIT_S, Server

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")


def test_answers_are_as_described(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == {"/predict", "/explain", "/model", "/health", "/metrics"}
    for operation in operations:

        @settings(
            max_examples=12 if operation.method == "post" else 2, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck), database=None,
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def follows_the_description(case) -> None:
            # A file may be empty and a class unknown, which a schema cannot express.
            case.call_and_validate(timeout=LIMIT_S, excluded_checks=[schemathesis.checks.positive_data_acceptance])

        follows_the_description()
