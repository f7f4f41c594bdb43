"""The web application: a page, answers as JSON, health and metrics.

A request is read (bfsys/serve/uploads.py), its files are prepared in the way that the model was trained to read them,
and they wait for the worker that computes (bfsys/serve/batching.py). Each file has its own answer or its own error.

Rejected alternative: FastAPI's own pages of documentation, which load scripts from other servers; /openapi.json
describes the service.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect
from torch import Tensor

from bfsys.answers import ranked
from bfsys.batch import Sample
from bfsys.errors import UserError, did_you_mean
from bfsys.explain.page import html
from bfsys.predict import Model
from bfsys.serve.batching import Worker
from bfsys.serve.guard import CLIENT_GONE, Guard, log
from bfsys.serve.limits import Limits
from bfsys.serve.metrics import Metrics
from bfsys.serve.uploads import FIELD, FORM, Upload, read_uploads

PATHS = ("/", "/predict", "/explain", "/model", "/health", "/metrics", "/openapi.json")
OF_EXPLANATIONS = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
RETRY_AFTER_S = 2
T = TypeVar("T")


class ClassProbability(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    class_name: str = Field(alias="class")
    index: int
    probability: float


class FileAnswer(BaseModel):
    """The answer to one file. It has `top` or `error`."""

    name: str
    top: list[ClassProbability] | None = Field(None, description="The likeliest classes, the likeliest first")
    error: str | None = Field(None, description="Why the file has no answer")
    note: str | None = Field(None, description="Why the prediction may be unreliable")
    out_of_distribution: float | None = Field(
        None, description="Out-of-distribution score; above 1, the file resembles none of the run's reference files"
    )


class Answers(BaseModel):
    answers: list[FileAnswer] = Field(description="In the order of the files")


class NoAnswers(BaseModel):
    detail: str
    answers: list[FileAnswer] | None = None


class Problem(BaseModel):
    detail: str


class About(BaseModel):
    """The model and the limits of the service."""

    classes: list[str]
    input_formats: list[str] = Field(description="Formats of pictures and sounds that training files were put into")
    reads_any_format: bool = Field(description="Whether some training files were used as they were")
    step: int = Field(description="The training step of the weights")
    least_bytes: int = Field(description="Length of the shortest file that the model accepts")
    max_bytes: int = Field(description="Length of the longest file in which no position repeats")
    limits: Limits


class Health(BaseModel):
    status: Literal["ready"] = "ready"
    step: int
    device: str


TEXT = {"text/plain": {"schema": {"type": "string"}}}
# uvicorn answers in plain text what is not HTTP.
WRONG_HOST: dict[int | str, dict[str, Any]] = {
    400: {
        "description": "The request is not valid HTTP (plain text), or its Host header is of another service",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}} | TEXT,
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = WRONG_HOST | {
    403: {"model": Problem, "description": "The request comes from a page of another site"},
    408: {"model": Problem, "description": "The body did not arrive in time"},
    413: {"model": Problem, "description": "A file or the request is too large, or holds too many files"},
    415: {"model": Problem, "description": f"The body is not {FORM}"},
    422: {"model": NoAnswers, "description": "An argument is wrong, or no file of the request can be classified"},
    500: {
        "model": NoAnswers,
        "description": "No file of the request has an answer, and the model failed on one of them",
    },
    503: {"model": Problem, "description": "Too many requests, or no answer in time; Retry-After says when to retry"},
}
BODY = {
    "required": True,
    "content": {
        FORM: {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {
                    FIELD: {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
                },
            }
        }
    },
}


class Busy(HTTPException):
    def __init__(self, detail: str) -> None:
        super().__init__(503, detail, {"retry-after": str(RETRY_AFTER_S)})


@dataclass
class Prepared:
    """A file that is ready for the model, or its error."""

    name: str
    sample: Sample | None = None
    error: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Question:
    """A request to explain which bytes of a file are evidence for a class."""

    upload: Upload
    class_name: str | None
    seed: int
    encode: bool
    as_html: bool


class Service:
    """A model, its worker threads and its counters."""

    def __init__(self, model: Model, limits: Limits, *, batch_bytes: int | None = None) -> None:
        """`batch_bytes` limits the files that are computed together. Default: data.eval_batch_bytes of the run."""
        budget = model.config.data.eval_batch_bytes if batch_bytes is None else batch_bytes
        most = limits.model_bytes or max(model.config.data.eval_batch_bytes, model.max_bytes)
        self.limits, self.metrics = replace(limits, model_bytes=most), Metrics()
        # Clients see the model's messages. They contain no paths of this machine, and name the service's option.
        self.model = model.with_messages("the model", "encode=true")
        self._most_bytes = most
        self.in_progress = 0
        self._computing: Worker[Sample, Tensor] = Worker(self._compute, self._cost, budget)
        # Decoders are slow and share a lock. They have a separate thread, so other files do not wait for them.
        self._decoding: Worker[Upload, Prepared] = Worker(
            lambda uploads: [self._prepared(upload, encode=True) for upload in uploads], lambda _: 1, 1
        )
        # An explanation takes hundreds of predictions, so it has a separate thread too.
        self._explaining: Worker[Question, dict | str] = Worker(
            lambda questions: [self._explained(question) for question in questions], lambda _: 1, 1
        )
        self._workers = (self._computing, self._decoding, self._explaining)
        self.metrics.queue.set_function(lambda: sum(worker.waiting for worker in self._workers))

    def close(self, timeout_s: float) -> bool:
        """Drop the queues, and wait up to `timeout_s` for the current items. Returns whether all threads have ended."""
        until = time.monotonic() + timeout_s
        ended = [worker.close(max(0, until - time.monotonic())) for worker in self._workers]  # closes all of them
        return all(ended)

    def check_encode(self, encode: bool) -> None:
        if encode and not self.model.input_formats:
            raise HTTPException(422, "encode: the formats of this model's training files are not known; leave it out")

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Take a place among the requests in progress. Raises HTTPException if none is free."""
        if self.in_progress >= self.limits.requests:
            raise Busy(f"{self.in_progress:,} requests are in progress, as many as are allowed; try again")
        self.in_progress += 1
        self.metrics.in_progress.inc()
        try:
            yield
        finally:
            self.in_progress -= 1
            self.metrics.in_progress.dec()

    async def handle(self, request: Request, work: Callable[[list[Upload]], Coroutine[Any, Any, T]]) -> T:
        """Return the result of `work` on the files of a request, within the limits."""
        async with self.place():
            deadline = asyncio.get_running_loop().time() + self.limits.seconds
            uploads = await self.receive(request, deadline)
            try:
                async with asyncio.timeout_at(deadline):
                    return await while_connected(request, work(uploads))
            except TimeoutError:
                raise Busy(f"no answer within {self.limits.seconds:g} s; send fewer files, or try again") from None

    async def receive(self, request: Request, deadline: float) -> list[Upload]:
        try:
            async with asyncio.timeout_at(deadline):
                uploads = await read_uploads(request, self.limits)
        except TimeoutError:
            detail = f"the request did not arrive within {self.limits.seconds:g} s"
            raise HTTPException(408, detail, {"connection": "close"}) from None
        self.metrics.files.inc(len(uploads))
        self.metrics.bytes.inc(sum(len(upload.content) for upload in uploads))
        return uploads

    async def explanation(self, question: Question) -> dict | str:
        """Return Explanation.as_dict, or a page. Raises HTTPException for a file or class that cannot be used."""
        (answer,) = await self._explaining.answers([question])
        if isinstance(answer, UserError):
            raise HTTPException(422, str(answer))
        if isinstance(answer, BaseException):
            log(answer)
            raise HTTPException(500, "the explanation of this file failed")
        return answer

    async def answers(self, uploads: list[Upload], top: int, encode: bool) -> tuple[list[dict], int]:
        """Return the content of each file's FileAnswer, and the HTTP status of the request."""
        self.check_encode(encode)
        if encode:
            prepared = [
                _or_error(one, u) for one, u in zip(await self._decoding.answers(uploads), uploads, strict=True)
            ]
        else:
            # Large files take tenths of a second; meanwhile the event loop answers other requests.
            prepared = await asyncio.to_thread(lambda: [self._prepared(upload, encode=False) for upload in uploads])
        waiting = [one for one in prepared if one.sample is not None]
        rows = await self._computing.answers([one.sample for one in waiting if one.sample is not None])
        status = 422
        answered = {}
        for one, row in zip(waiting, rows, strict=True):
            if isinstance(row, BaseException) or not math.isfinite(float(row.sum())):
                status = 500
                if isinstance(row, BaseException):
                    log(row)
                one.error = "the model failed on this file: non-finite output, or not enough memory"
            else:
                answered[id(one)] = row
        self.metrics.refused_files.inc(len(prepared) - len(answered))
        contents = await asyncio.to_thread(lambda: [self._answer(one, answered.get(id(one)), top) for one in prepared])
        return contents, 200 if answered else status

    def _prepared(self, upload: Upload, *, encode: bool) -> Prepared:
        problems: list[str] = []
        notes: list[str] = []
        inputs = [(upload.name, upload.content)]
        sample = next(self.model.reader.samples(inputs, problems, notes.append, encode=encode), None)
        error = "; ".join(problem.removeprefix(f"{upload.name}: ") for problem in problems)
        if sample and len(sample.data) > self._most_bytes:
            error = f"the model would read {len(sample.data):,} bytes of it; {self._most_bytes:,} are allowed"
            return Prepared(upload.name, error=error)
        return Prepared(upload.name, sample, error or None, notes[0] if notes else None)

    def _explained(self, question: Question) -> dict | str:
        upload = question.upload
        if error := self._prepared(upload, encode=question.encode).error:
            raise UserError(error)
        found = self.model.explain(upload.content, question.class_name, question.seed, encode=question.encode)
        found = replace(found, name=upload.name)
        return html(found) if question.as_html else found.as_dict()

    def _compute(self, samples: list[Sample]) -> list[Tensor]:
        self.metrics.batch_files.observe(len(samples))
        self.metrics.batch_bytes.observe(sum(len(sample.data) for sample in samples))
        return list(self.model.probabilities_of(samples))

    def _cost(self, sample: Sample) -> int:
        return max(len(sample.data), self.model.rounding_bytes)

    def _answer(self, one: Prepared, row: Tensor | None, top: int) -> dict:
        answer: dict[str, Any] = {"name": one.name}
        if row is None:
            answer["error"] = one.error
        else:
            (best,) = ranked(row[None], self.model.classes, top)
            if one.sample and (references := self.model.reader.references):
                answer["out_of_distribution"] = references.score(one.sample.data)
            answer["top"] = [c.to_dict() for c in best]
        return answer | ({"note": one.note} if one.note else {})


def _or_error(one: Prepared | BaseException, upload: Upload) -> Prepared:
    if isinstance(one, UserError):
        return Prepared(upload.name, error=str(one))
    if isinstance(one, BaseException):
        log(one)
        return Prepared(upload.name, error="cannot be decoded")
    return one


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
            return await service.explanation(Question(uploads[0], class_name, seed, encode, as_html))

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


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. The body must have been read.

    If the client closes the connection, cancel `work` and raise ClientDisconnect.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def content_security_policy(page: str) -> str:
    """Return a policy that allows the page its own script, by its hash, and nothing from other servers."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
