"""The server does what its own description says."""

from __future__ import annotations

from http.client import HTTPConnection

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve import client
from tests.serve.conftest import LIMIT_S, Server

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")


@pytest.mark.parametrize("path", ["/model", "/health"])
def test_every_field_of_an_answer_is_described(path: str, server: Server) -> None:
    description = client.get(f"{server.url}/openapi.json").json()
    schema = description["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(schema) == {"$ref"}
    described = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    assert set(described) == set(client.get(server.url + path).json())


@pytest.mark.parametrize("path", ["/model", "/health", "/metrics", "/predict", "/explain"])
@pytest.mark.parametrize("host", ["none", "of another service", "own"])
def test_the_content_type_of_an_answer_is_described(host: str, path: str, server: Server) -> None:
    ((method, described),) = client.get(f"{server.url}/openapi.json").json()["paths"][path].items()
    if host == "own" and method == "post":
        return  # test_answers_are_as_described
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=LIMIT_S)
    connection.putrequest(method.upper(), path, skip_host=host != "own")
    if host == "of another service":
        connection.putheader("Host", "other.site")
    connection.endheaders()
    answer = connection.getresponse()
    connection.close()
    assert answer.status == (200 if host == "own" else 400)
    assert answer.headers.get_content_type() in described["responses"][str(answer.status)]["content"]


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
