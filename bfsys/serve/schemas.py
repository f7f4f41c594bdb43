"""What the service answers, as types and as descriptions in /openapi.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bfsys.serve.limits import Limits
from bfsys.serve.uploads import FIELD, FORM


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
