"""The web application: a page, answers as JSON, health and metrics.

service.py does the work, and schemas.py has the types of the answers.

Rejected alternative: FastAPI's own pages of documentation, which load scripts from other servers; /openapi.json
describes the service.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect

from bfsys.errors import did_you_mean
from bfsys.serve.guard import CLIENT_GONE, Guard
from bfsys.serve.schemas import BODY, REFUSALS, TEXT, WRONG_HOST, About, Answers, Health
from bfsys.serve.service import Service
from bfsys.serve.uploads import Upload

PATHS = ("/", "/predict", "/explain", "/model", "/health", "/metrics", "/openapi.json")
OF_EXPLANATIONS = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def application(service: Service, hosts: list[str] | None) -> Guard:
    """Make the ASGI application. `hosts` are the allowed host names; None allows any."""
    model, limits = service.model, service.limits
    app = FastAPI(
        title="bfsys", version="1", docs_url=None, redoc_url=None,
        description="Classes of files, from their bytes. Uploaded files are neither stored nor logged.",
    )  # fmt: skip
    page = files("bfsys.serve").joinpath("page", "index.html").read_text(encoding="utf-8")
    policy = content_security_policy(page)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/model", summary="Classes, formats and limits", responses=WRONG_HOST)
    async def describe() -> About:
        return About(
            classes=list(model.classes),
            input_formats=list(model.input_formats),
            reads_any_format=model.reader.reads_any_format,
            step=model.step,
            least_bytes=model.least_bytes,
            max_bytes=model.max_bytes,
            limits=limits,
        )

    @app.get("/health", summary="Whether the model is loaded", responses=WRONG_HOST)
    async def health() -> Health:
        return Health(step=model.step, device=str(model.device))

    for path, answer_to_get in (("/", index), ("/health", health)):  # as probes ask
        app.add_api_route(path, answer_to_get, methods=["HEAD"], include_in_schema=False)

    @app.get(
        "/metrics", summary="Counters for Prometheus", response_class=Response,
        responses=WRONG_HOST | {200: {"content": TEXT}},
    )  # fmt: skip
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post(
        "/predict", summary="Classes of files", response_model=Answers, responses=REFUSALS,
        dependencies=[Depends(check_arguments)],
        openapi_extra={"requestBody": BODY},
        description="A file that cannot be classified has an `error` in its answer, and the other files are still "
        "answered. If no file can be classified, the status is 422, or 500 if the model failed on one of them.",
    )  # fmt: skip
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1_000_000, description="Classes for each file")] = 3,
        encode: Annotated[bool, Query(description="Put pictures and sounds into the model's format first")] = False,
    ) -> JSONResponse:
        answers, status = await service.handle(request, lambda uploads: service.answers(uploads, top, encode))
        detail = {} if status == 200 else {"detail": "no file of the request can be classified"}
        return JSONResponse(detail | {"answers": answers}, status)

    @app.post(
        "/explain", summary="Which bytes of a file are evidence for a class", response_model=dict[str, Any],
        responses=REFUSALS | {200: {"content": {"text/html": {}}}}, openapi_extra={"requestBody": BODY},
        dependencies=[Depends(check_arguments)],
        description="Explains one file, by default for its likeliest class. Returns a page for `Accept: text/html`.",
    )  # fmt: skip
    async def explain(
        request: Request,
        class_name: Annotated[str | None, Query(alias="class", description="One of the model's classes")] = None,
        seed: Annotated[int, Query(ge=0, le=2**31 - 1, description="Seed of the choice of reference files")] = 0,
        encode: Annotated[bool, Query(description="Put a picture or sound into the model's format first")] = False,
    ) -> Response:
        as_html = "text/html" in request.headers.get("accept", "")

        async def work(uploads: list[Upload]) -> dict | str:
            if len(uploads) > 1:
                raise HTTPException(422, f"got {len(uploads):,} files; one at a time can be explained")
            service.check_encode(encode)
            return await service.explanation(uploads[0], class_name, seed, encode=encode, as_html=as_html)

        answer = await service.handle(request, work)
        if isinstance(answer, str):
            return HTMLResponse(answer, headers={"content-security-policy": OF_EXPLANATIONS})
        return JSONResponse(answer)

    app.add_exception_handler(RequestValidationError, _on_wrong_argument)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    return Guard(app, service.metrics, PATHS, hosts)


async def check_arguments(request: Request) -> None:
    """Refuse arguments in the URL that the path does not have, which would be ignored, and those given twice."""
    allowed = [argument.alias for argument in request.scope["route"].dependant.query_params]
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in allowed:
            known = f"allowed are {', '.join(allowed)}{did_you_mean(name, allowed)}"
            raise HTTPException(422, f"{name[:100]}: is not an argument of {request.url.path}; {known}")
        if count > 1:
            raise HTTPException(422, f"{name}: is given {count} times; once is allowed")


async def _on_wrong_argument(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    text = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
    return JSONResponse({"detail": text}, 422)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # only for the counters


def content_security_policy(page: str) -> str:
    """Return a policy that allows the page its own script, by its hash, and nothing from other servers."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
