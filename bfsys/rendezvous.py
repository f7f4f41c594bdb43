"""The rendezvous of ranks at MASTER_ADDR:MASTER_PORT, before they form a process group.

The launchers set the environment variables; ranks.py reads the rank of this process.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from bfsys.errors import EXIT_CRASHED, TO_START_MORE, UserError, remedy_of, some
from bfsys.process import open_files_limit, threads_that_start
from bfsys.ranks import Ranks, env_number

# Ranks that do not join within this time are reported, while the others keep waiting.
SAY_AFTER_S = 15.0
MEET_POLL_S = 0.05
# With more ranks, connecting all pairs would need more open files than many machines allow, and the time of a start
# would grow with the square of the ranks. Fewer ranks are all connected at the start, because with connections on
# demand, a rank that is lost before it connects leaves others waiting until the watchdog ends them.
MOST_RANKS_ALL_CONNECTED = 64
# Open files of a rank, without its connections to others. With fewer, libraries fail with messages of their own, which
# often do not name the cause.
LEAST_OPEN_FILES = 64
# Threads and processes that a rank on a CPU starts: those of PyTorch, DeepSpeed and the checkpoint writer, and for each
# thread that computes, one of the forward and one of the backward pass. With fewer, libraries hang, or fail with
# messages of their own.
LEAST_THREADS = 6


def check_open_files(world_size: int) -> None:
    limit, needed = open_files_limit(), LEAST_OPEN_FILES + min(world_size, MOST_RANKS_ALL_CONNECTED)
    if limit < needed:
        raise UserError(
            f"a rank may have {limit:,} open files, and needs {needed:,} at least; {remedy_of(errno.EMFILE)}"
        )


def check_threads(ranks: int, computing: int) -> None:
    """Raise UserError if the system does not allow the threads that ranks of this process need at least, each with
    `computing` threads that compute."""
    needed = ranks * (LEAST_THREADS + 2 * computing)
    if (possible := threads_that_start(needed)) < needed:
        raise UserError(
            f"training needs at least {needed:,} more processes and threads, and the system allows {possible:,} more; "
            f"{TO_START_MORE}",
            exit_code=EXIT_CRASHED,
        )


def check_loopback(address: str) -> None:
    """Raise UserError if this is an address of this machine alone, and its interface is down, as in a new network
    namespace. PyTorch would try to connect until its timeout."""
    if not address.startswith("127."):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((address, 9))  # sends nothing; the kernel only chooses the route
        except OSError as error:
            raise UserError(
                f"the loopback interface of this machine is down, so its processes cannot connect to {address} "
                f"({error.strerror}); bring it up (ip link set lo up)"
            ) from None


def store_of_all(ranks: Ranks, timeout_s: int) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT. Rank 0 serves it, unless the launcher does."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set, so {ranks.world_size} ranks "
            "cannot connect; launchers set them, or export the first host's name and a free port"
        )
    if not 0 < env_number("MASTER_PORT", 0) < 2**16:
        raise UserError(f"MASTER_PORT is {os.environ['MASTER_PORT']}; a port is a number from 1 to 65535")
    host, port = os.environ["MASTER_ADDR"], env_number("MASTER_PORT", 0)
    # torchrun may serve a store already, which survives restarts of its ranks. The prefix separates the starts.
    is_given = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}" if is_given else "start"
    said = f"rank {ranks.rank} has waited {SAY_AFTER_S:.0f} s for rank 0 to answer at {host}:{port}"
    waiting = threading.Timer(SAY_AFTER_S, _say, [said])
    waiting.daemon = True
    waiting.start()
    try:
        found = socket.getaddrinfo(host, None)
        check_loopback(str(found[0][4][0]))
        patience = timedelta(seconds=timeout_s)
        store = dist.TCPStore(
            host, port, ranks.world_size, ranks.is_rank_zero and not is_given, patience, wait_for_workers=False
        )
        return dist.PrefixStore(start, store)
    except OSError as error:
        problem = f"MASTER_ADDR {host!r} cannot be resolved on this machine ({error.strerror})"
        raise UserError(problem, exit_code=EXIT_CRASHED) from None
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            problem = (
                f"MASTER_PORT: port {port} of this machine is in use, perhaps by another run; "
                "give another one (deepspeed --master_port N, torchrun --master-port N), or use bfsys launch; "
                "under srun, start it again: each step has a port of its own"
            )
        else:
            problem = f"rank {ranks.rank}: the rendezvous of the ranks at {host}:{port} failed: {first_line(error)}"
        raise UserError(problem, exit_code=EXIT_CRASHED) from error
    finally:
        waiting.cancel()


def meet(store: dist.Store, ranks: Ranks, identity: str, timeout_s: float) -> list[str]:
    """Wait until all ranks have joined. Returns every rank's `identity`, by rank. Rank 0 reports late ranks."""
    names = [f"rank {rank}" for rank in range(ranks.world_size)]
    store.set(names[ranks.rank], identity)
    if not ranks.is_rank_zero:
        try:
            return json.loads(store.get("all ranks"))
        except RuntimeError as error:
            raise UserError(
                f"rank 0 did not confirm that all ranks have joined: {first_line(error)}", exit_code=EXIT_CRASHED
            ) from None
    began, said = time.monotonic(), False
    while not store.check(names):
        time.sleep(MEET_POLL_S)
        waited_s = time.monotonic() - began
        if waited_s > SAY_AFTER_S and not said:
            _say(f"waiting for up to {timeout_s:.0f} s for {_missing(store, names)}")
            said = True
        if waited_s > timeout_s:
            problem = f"no connection within {timeout_s:.0f} s from {_missing(store, names)}"
            raise UserError(problem, exit_code=EXIT_CRASHED)
    identities = [store.get(name).decode() for name in names]
    store.set("all ranks", json.dumps(identities))
    return identities


def _missing(store: dist.Store, names: list[str]) -> str:
    missing = [name for name in names if not store.check([name])]
    return f"{some(missing, 10)} ({len(missing)} of {len(names)} ranks)"


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
