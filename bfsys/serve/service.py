"""The work of the service: files are prepared, and wait for the threads that compute.

A request is read (uploads.py), its files are prepared in the way that the model was trained to read them, and they wait
for the worker that computes (batching.py). Each file has its own answer or its own error.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect
from torch import Tensor

from bfsys.answers import ranked
from bfsys.batch import Sample
from bfsys.errors import UserError
from bfsys.explain.page import html
from bfsys.predict import Model
from bfsys.serve.batching import Worker
from bfsys.serve.guard import log
from bfsys.serve.limits import Limits
from bfsys.serve.metrics import Metrics
from bfsys.serve.uploads import Upload, read_uploads

RETRY_AFTER_S = 2
T = TypeVar("T")


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
        self._explaining: Worker[Callable[[], dict | str], dict | str] = Worker(
            lambda explain: [one() for one in explain], lambda _: 1, 1
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

    async def explanation(
        self, upload: Upload, class_name: str | None, seed: int, *, encode: bool, as_html: bool
    ) -> dict | str:
        """Return Explanation.as_dict, or a page. Raises HTTPException for a file or class that cannot be used."""

        def explain() -> dict | str:
            if error := self._prepared(upload, encode=encode).error:
                raise UserError(error)
            found = replace(self.model.explain(upload.content, class_name, seed, encode=encode), name=upload.name)
            return html(found) if as_html else found.as_dict()

        (answer,) = await self._explaining.answers([explain])
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
