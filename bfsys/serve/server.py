"""The process of the service: its socket, its start, and its end after a signal."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import uvicorn

from bfsys.errors import TOGETHER_S
from bfsys.serve.app import application
from bfsys.serve.listener import BACKLOG, is_loopback, listen
from bfsys.serve.service import Service

SECONDS_TO_FINISH = 5.0  # for the current batch, after all requests have ended


def serve(service: Service, listener: socket.socket, host: str) -> None:
    """Answer requests until SIGINT, SIGTERM or SIGHUP. Requests in progress are still answered within their time limit.

    Raises UserError if another process took the port in the meantime.
    """
    # The model's warnings name files, and answers already have them as notes. The parser's warnings quote the body.
    warnings.simplefilter("ignore")
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    hosts = ["localhost", "127.0.0.1", "[::1]", shown.lower()] if is_loopback(listener) else None
    with closing(listener):
        listen(listener, host)
        # h11: the implementation that every installation of uvicorn has.
        config = uvicorn.Config(
            application(service, hosts), http="h11", ws="none", lifespan="off",
            log_config=None, access_log=False, log_level="error",
            server_header=False, proxy_headers=False, backlog=BACKLOG,
            timeout_graceful_shutdown=int(service.limits.seconds) + 1,
        )  # fmt: skip
        asyncio.run(_run(_Server(config), listener, f"http://{shown}:{port}"))
    if not service.close(SECONDS_TO_FINISH):
        # A computation cannot be interrupted, and Python aborts a process that ends with a thread inside PyTorch.
        sys.stdout.flush()
        os._exit(0)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing. uvicorn would end the process by the signal, not with exit code 0."""
        yield


async def _run(server: uvicorn.Server, listener: socket.socket, url: str) -> None:
    loop, asked_at = asyncio.get_running_loop(), -math.inf
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))

    def stop(number: int) -> None:
        nonlocal asked_at
        if number == signal.SIGINT or loop.time() - asked_at >= TOGETHER_S:
            if server.should_exit:  # a second request to stop
                serving.cancel()  # since Python 3.12, uvicorn's `force_exit` still waits until clients disconnect
            server.should_exit, asked_at = True, loop.time()

    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup has it ignored
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
        loop.add_signal_handler(number, stop, number)
    print(f"{url}  ready; Ctrl-C stops", flush=True)
    with suppress(asyncio.CancelledError):
        await serving
