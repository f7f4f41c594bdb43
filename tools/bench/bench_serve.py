"""Requests per second of `bfsys serve` with micro-batches, against one file at a time.

    python tools/bench/bench_serve.py RUN --clients 1,8,64 --file-bytes 2000 --json serve.json

Two servers of the same run differ only in their batch budget: data.eval_batch_bytes of the run, or one file. They
are measured in turn, in the same run of this program, and the best of all rounds counts. A client sends a file of
random bytes over one connection, and sends the next one when it has the answer. One process runs all clients, on the
same machine as the servers.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bfsys.errors import UserError, run_command, summary_of
from bfsys.files import replace_file

VARIANTS = {"batches": None, "one by one": 1}  # byte budget; None: the run's budget
BOUNDARY = "frontier"
LIMIT_S = 300
CHILD = """
import sys
from pathlib import Path
from bfsys.errors import run_command
from bfsys.predict import load
from bfsys.serve.service import Service
from bfsys.serve.limits import Limits
from bfsys.serve.listener import bind
from bfsys.serve.server import serve
run, budget = sys.argv[1:]
limits = Limits(requests=1000, seconds=300)

def main():
    serve(Service(load(Path(run)), limits, batch_bytes=int(budget) or None), bind("127.0.0.1", 0), "127.0.0.1")

run_command(main)
"""


class Server:
    """A server process; a context manager."""

    def __init__(self, run: Path, budget: int | None) -> None:
        command = [sys.executable, "-c", CHILD, str(run.absolute()), str(budget or 0)]
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{run}: cannot be served; the reason is above")
        self.port = int(line.split()[0].rpartition(":")[2])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def request_with(content: bytes) -> bytes:
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    body = part.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    head = (
        f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    )
    return head.encode() + body


async def client(port: int, requests: Sequence[bytes], until: float) -> int:
    """Send requests until `until`, and at least one. Returns the number of answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answered = 0
    try:
        while not answered or time.monotonic() < until:
            writer.write(requests[answered % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise UserError(f"the server refused a request: {head.splitlines()[0].decode()}")
            fields = dict(line.lower().split(b": ", 1) for line in head.splitlines()[1:-1])
            await reader.readexactly(int(fields[b"content-length"]))
            answered += 1
    finally:
        writer.close()
    return answered


async def rate(port: int, clients: int, file_bytes: int, seconds: float) -> float:
    """Measure requests per second."""
    rng = np.random.default_rng(0)
    requests = [[request_with(rng.bytes(file_bytes)) for _ in range(4)] for _ in range(clients)]
    began = time.monotonic()
    async with asyncio.timeout(seconds + LIMIT_S):
        answered = sum(await asyncio.gather(*(client(port, own, began + seconds) for own in requests)))
    return answered / (time.monotonic() - began)


def measure(run: Path, clients: Sequence[int], file_bytes: int, seconds: float, repeats: int) -> list[dict]:
    with ExitStack() as stack:
        servers = {name: stack.enter_context(Server(run, budget)) for name, budget in VARIANTS.items()}
        for server in servers.values():
            asyncio.run(rate(server.port, 2, file_bytes, min(1.0, seconds)))  # not counted
        rows = []
        for count in clients:
            rates = dict.fromkeys(servers, 0.0)
            for _ in range(repeats):
                for name, server in servers.items():
                    rates[name] = max(rates[name], asyncio.run(rate(server.port, count, file_bytes, seconds)))
            rows.append({"clients": count, **rates, "ratio": rates["batches"] / max(rates["one by one"], 1e-9)})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=summary_of(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--file-bytes", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        clients = [int(text) for text in args.clients.split(",")]
    except ValueError:
        clients = [0]
    if min(clients) < 1:
        raise UserError(f"--clients: got {args.clients!r}; whole numbers of at least 1 are needed, such as 1,8,64")
    for option, value in (("--file-bytes", args.file_bytes), ("--seconds", args.seconds), ("--repeats", args.repeats)):
        if not value > 0:
            raise UserError(f"{option}: got {value}; a number above 0 is needed")
    rows = measure(args.run, clients, args.file_bytes, args.seconds, args.repeats)
    table = Table(box=box.SIMPLE, title=f"requests/s, files of {args.file_bytes:,} bytes")
    for heading in ("clients", *VARIANTS, "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(str(row["clients"]), *(f"{row[name]:.1f}" for name in VARIANTS), f"{row['ratio']:.2f}")
    Console().print(table)
    if args.json:
        replace_file(args.json, json.dumps({"file_bytes": args.file_bytes, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
