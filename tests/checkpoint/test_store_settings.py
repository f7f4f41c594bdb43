"""Settings with which a store cannot be used: no credentials, another region, no URL. No pause helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from bfsys.checkpoint.store import Store, StoreError
from bfsys.errors import EXIT_USER_ERROR
from tests.s3_server import ERRORS, S3Server


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Unable to locate credentials"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY"),
        ({"AWS_PROFILE": "mine"}, r"The config profile \(mine\) could not be found"),
        ({"AWS_DEFAULT_REGION": "eu west"}, "Provided region_name 'eu west' doesn't match a supported format"),
        ({"AWS_ENDPOINT_URL": "store.example:9000"}, "Invalid endpoint: store.example:9000"),
    ],
)
def test_missing_credentials_are_no_outage(
    s3: S3Server, tmp_path: Path, variables: dict, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in variables.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    said: list[str] = []
    with pytest.raises(StoreError, match=says) as caught:
        Store("s3://bucket/copies/mine", pauses_s=(0.01,), say=said.append).names()
    assert (said, caught.value.exit_code) == ([], EXIT_USER_ERROR)


@pytest.mark.parametrize("code", ["PermanentRedirect", "AuthorizationHeaderMalformed", "InvalidToken"])
def test_another_region_or_token_is_no_outage(s3: S3Server, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ERRORS, 400, ("400 Bad Request", code))
    s3.fault = lambda request: 400
    said: list[str] = []
    with pytest.raises(StoreError, match="as the test wants it") as caught:
        Store("s3://bucket/copies/mine", pauses_s=(0.01,), say=said.append).names()
    assert (said, caught.value.exit_code) == ([], EXIT_USER_ERROR)


@pytest.mark.parametrize("code", ["BadDigest", "IncompleteBody", "TemporaryRedirect"])
def test_an_error_of_the_transport_is_retried(s3: S3Server, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ERRORS, 400, ("400 Bad Request", code))
    faults = iter((400,))
    s3.fault = lambda request: next(faults, None)
    said: list[str] = []
    assert Store("s3://bucket/copies/mine", pauses_s=(0.01,), say=said.append).names() == []
    assert len(said) == 1


def test_an_error_whose_cause_has_another_kind_of_response_is_retried(tmp_path: Path) -> None:
    class HttpError(Exception):
        response = 503  # libraries of HTTP keep an object or None here

    def fail() -> None:
        raise OSError("no answer") from HttpError()

    store, said = Store(f"file://{tmp_path}", pauses_s=(0.01,), say=lambda text: said.append(text)), []
    with pytest.raises(StoreError, match="no answer"):
        store._tried("cannot be read", fail)
    assert len(said) == 1
