"""Files from a multipart body, read as it arrives, in memory only.

Rejected alternative: FastAPI's UploadFile, which writes files above 1 MB to disk and receives the whole body before any
limit is checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from bfsys.errors import counted
from bfsys.serve.limits import Limits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD = "files"
FORM = "multipart/form-data"
# A name in other letters than ASCII, as some clients send it (RFC 5987): its encoding, and the name
EXTENDED_NAME = re.compile(rb";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^;\s]+)", re.IGNORECASE)


@dataclass
class Upload:
    name: str
    """The name that the client gave; `file N` if it gave none."""
    content: bytearray = field(default_factory=bytearray)


async def read_uploads(request: Request, limits: Limits) -> list[Upload]:
    """Read the files of a request's body, at least one.

    Raises HTTPException: 413 as soon as a limit is exceeded; 415 for another content type; 422 for a body that is
    malformed or has no file.
    """
    boundary = _boundary(request)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.request_bytes:
        raise _too_many_bytes(limits)
    form = _Form(limits)
    received = 0
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in request.stream():
            received += len(chunk)
            if received > limits.request_bytes:
                raise _too_many_bytes(limits)
            parser.write(chunk)
    except FormParserError:
        raise HTTPException(422, f"the body is not a valid {FORM}") from None
    if not form.has_ended:
        raise HTTPException(422, f"the body is cut short: the last boundary of the {FORM} is missing")
    if not form.uploads:
        raise HTTPException(422, f"the request holds no file; send files in fields named {FIELD!r}")
    return form.uploads


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != FORM.encode():
        raise HTTPException(415, f"the body must be {FORM}, with files in fields named {FIELD!r}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "a compressed body (Content-Encoding) is not allowed; send the files as they are")
    if not (boundary := options.get(b"boundary")):
        raise HTTPException(422, f"Content-Type: {FORM} needs a boundary; most clients add it by themselves")
    return boundary


def _too_many_bytes(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the request is larger than {limits.request_bytes:,} bytes; send fewer files at a time")


class _Form:
    """The callbacks of the parser. They collect files, and stop at the first error."""

    def __init__(self, limits: Limits) -> None:
        self.uploads: list[Upload] = []
        self.has_ended = False
        self._limits = limits
        self._header_name, self._header_value = bytearray(), bytearray()
        self._disposition = b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        name, value = bytes(self._header_name).lower(), bytes(self._header_value)
        if name == b"content-disposition":
            self._disposition = value
        if name == b"content-transfer-encoding" and value.strip().lower() not in (b"binary", b"8bit", b"7bit"):
            shown = value.decode(errors="replace")[:100]
            raise HTTPException(415, f"Content-Transfer-Encoding: got {shown!r}; send the files as they are")
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        disposition, self._disposition = self._disposition, b""
        _, options = parse_options_header(disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if name != FIELD:
            raise HTTPException(422, f"got a field named {name[:100]!r}; send files in fields named {FIELD!r}")
        if len(self.uploads) == self._limits.files:
            raise HTTPException(
                413, f"the request holds more than {counted(self._limits.files, 'file')}; send fewer at a time"
            )
        file_name = options.get(b"filename", b"").decode(errors="replace")
        if extended := EXTENDED_NAME.search(disposition):
            file_name = unquote(extended[2].decode(errors="replace"), extended[1].decode(), "replace")
        self.uploads.append(Upload(file_name or f"file {len(self.uploads) + 1}"))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        upload = self.uploads[-1]
        if len(upload.content) + end - start > self._limits.file_bytes:
            raise HTTPException(413, f"{upload.name[:200]}: is larger than {self._limits.file_bytes:,} bytes")
        upload.content += memoryview(data)[start:end]

    def _on_end(self) -> None:
        self.has_ended = True
