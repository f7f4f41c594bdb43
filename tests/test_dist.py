"""Ranks from the launchers' variables; agreement among several ranks is tested by whole runs (test_train.py)."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bfsys import dist, rendezvous
from bfsys.errors import UserError
from bfsys.ranks import ranks_from_environment

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_SIZE",
)  # fmt: skip


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`launcher(NAME="value", …)` sets a launcher's variables and removes all others."""

    def set_variables(**variables: str) -> None:
        for name in LAUNCHER_VARIABLES:
            monkeypatch.setenv(name, "")  # so that variables that a start sets are restored too
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, dist.Ranks()),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            dist.Ranks(5, 8, 1, 4),
        ),  # torchrun
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, dist.Ranks(5, 8, 1, 4)),  # deepspeed
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, dist.Ranks()),  # a batch script
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "x"}, dist.Ranks()),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "2"},
            dist.Ranks(5, 8, 1, 4),
        ),  # torchrun, which mpirun has started on each machine
    ],
)
def test_ranks_come_from_the_launcher(variables: dict[str, str], ranks: dist.Ranks, launcher) -> None:
    launcher(**variables)
    assert ranks_from_environment() == ranks


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RANK": "0"}, "RANK is '0', but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first', which is not a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', which is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK is 2, but there are 2 ranks \(WORLD_SIZE\), numbered from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0, but there are 0 ranks"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, so mpirun has started .*, but RANK is not set"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2, so mpirun has started this process as one of several"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is not a whole number"),
    ],
)
def test_a_half_set_environment_is_named(variables: dict[str, str], problem: str, launcher) -> None:
    launcher(**variables)
    with pytest.raises(UserError, match=problem):
        ranks_from_environment()


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT are not set, so 2 ranks cannot connect"),
        ({"MASTER_PORT": "12345"}, "MASTER_ADDR is not set, so 2 ranks cannot connect"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "ssh"}, "MASTER_PORT is 'ssh', which is not a whole number"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "a port is a number from 1 to 65535"),
        ({"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "12345"}, "cannot be resolved on this machine"),
    ],
)
def test_several_ranks_need_a_rendezvous_address(variables: dict[str, str], problem: str, launcher) -> None:
    launcher(**variables)
    with pytest.raises(UserError, match=problem):
        dist.start(dist.Ranks(0, 2, 0, 2), timeout_s=1)


def test_a_port_that_is_in_use_is_named(launcher) -> None:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        launcher(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with pytest.raises(UserError, match=f"port {port} of this machine is in use.*--master_port") as error:
            dist.start(dist.Ranks(0, 2, 0, 2), timeout_s=5)
    assert error.value.exit_code == 1  # a launcher uses another port for a restart


def test_a_rank_that_is_late_is_named(launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(rendezvous, "SAY_AFTER_S", 0.1)
    store = torch.distributed.HashStore()
    store.set("rank 2", "")
    with pytest.raises(UserError, match=r"no connection within 0 s from rank 1, rank 3 \(2 of 4 ranks\)") as error:
        rendezvous.meet(store, dist.Ranks(0, 4, 0, 4), "", timeout_s=0.3)
    assert error.value.exit_code == 1
    assert capsys.readouterr().err == "waiting for up to 0 s for rank 1, rank 3 (2 of 4 ranks)\n"


def test_a_local_rank_of_mpirun_does_not_contradict_that_of_a_launcher(launcher) -> None:
    """DeepSpeed refuses to start if they differ, as they do if mpirun has started the launcher."""
    launcher(OMPI_COMM_WORLD_LOCAL_RANK="1")
    dist.start(dist.Ranks(), timeout_s=5)
    dist.stop()
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ


def test_ranks_that_would_share_a_gpu_are_refused() -> None:
    dist._check_gpus(["GPU-1 of n1", "GPU-2 of n1", "GPU-1 of n2"])
    with pytest.raises(dist.AgreedError, match="ranks 0, 2 would share GPU GPU-1 of n1; one rank per GPU"):
        dist._check_gpus(["GPU-1 of n1", "GPU-2 of n1", "GPU-1 of n1"])


@pytest.mark.parametrize("value", ["bogus", "CPU", "cuda"])
def test_an_accelerator_that_is_not_there_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("DS_ACCELERATOR", value)
    with pytest.raises(UserError, match=f"DS_ACCELERATOR: got '{value}'; allowed is cpu, since PyTorch finds no GPU"):
        _ = dist.Ranks().device
    monkeypatch.setenv("DS_ACCELERATOR", "")
    assert dist.Ranks().device.type == "cpu"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert dist.Ranks(1, 3, 1, 3).device == torch.device("cuda", 1)
    with pytest.raises(UserError, match="3 ranks on this machine, but 2 GPUs; one rank per GPU is allowed"):
        _ = dist.Ranks(2, 3, 2, 3).device


def test_one_visible_gpu_and_two_ranks_are_refused_before_nccl_starts(
    launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens on a machine with one GPU and `torchrun --nproc-per-node 2`."""
    launcher()
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="7"))
    store = torch.distributed.HashStore()
    store.set("rank 1", dist._device_identity(torch.device("cuda", 0)))
    monkeypatch.setattr(dist, "store_of_all", lambda ranks, timeout_s: store)
    with pytest.raises(dist.AgreedError, match="ranks 0, 1 would share GPU 7 of "):
        dist.start(dist.Ranks(0, 2, 0, 2), timeout_s=5)


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:21034", True),
        ("[../gloo/transport/tcp/pair.cc:446] Read error [10.0.0.7]:21034: Connection reset by peer", True),
        ("[../gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: Connection refused", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv", False),
        ("[../gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth7", False),
        ("NCCL error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000", False),
    ],
)
def test_only_a_peer_that_has_ended_is_a_lost_connection(text: str, is_lost: bool) -> None:
    assert bool(dist.lost_connection(RuntimeError(text + "\nException raised from …"))) == is_lost
    assert dist.lost_connection(RuntimeError(text)) in ("", text)


ALONE = """
import torch
from bfsys import dist
from bfsys.errors import exit_code_of

def main():
    dist.start(dist.Ranks(), timeout_s=77)
    torch.distributed.new_group()
    dist.leave_hangs_to_the_watchdog()
    for group in torch.distributed.distributed_c10d._world.pg_map:
        print(group._get_backend(torch.device("cpu")).options._timeout)

dist.hard_exit(exit_code_of(main))
"""


def test_every_group_leaves_hangs_to_the_watchdog_and_a_process_alone_needs_no_port(run_ranks) -> None:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = f"import os; os.environ['MASTER_PORT'] = '{s.getsockname()[1]}'"
        (result,) = run_ranks(1, ["-c", port + ALONE])
    assert (result.returncode, result.stdout) == (0, "7 days, 0:00:00\n" * 2), result.stderr


LATE = """
import datetime, time, torch
from bfsys import dist
from bfsys.errors import exit_code_of
from bfsys.ranks import ranks_from_environment

def main():
    ranks = ranks_from_environment()
    dist.start(ranks, timeout_s=600)
    dist.agree_on_max(ranks.rank)  # connects the ranks
    for group in torch.distributed.distributed_c10d._world.pg_map:
        group.set_timeout(datetime.timedelta(milliseconds=10))
    dist.leave_hangs_to_the_watchdog()
    for exchange in (dist.agree_on_max, dist.broadcast_from_rank0, lambda n: dist.all_reduce(torch.ones(n))):
        if ranks.rank == 0:
            time.sleep(0.1)  # as when SLURM continues the suspended nodes one after another
        exchange(1)
    dist.stop()

dist.hard_exit(exit_code_of(main))
"""


def test_a_rank_that_was_suspended_for_longer_than_the_timeout_is_awaited(run_ranks) -> None:
    for result in run_ranks(2, ["-c", LATE]):
        assert result.returncode == 0, result.stderr


THREADS = """
import os, socket, torch
from bfsys import dist
from bfsys.ranks import ranks_from_environment
del os.environ["OMP_NUM_THREADS"]
if {pods}:  # as PyTorchJob of Kubeflow starts ranks, each in a container
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    socket.gethostname = lambda: "pod-" + os.environ["RANK"]
dist.usable_cores = lambda: 6
dist.start(ranks_from_environment(), timeout_s=100)
print(torch.get_num_threads())
dist.agree_on_max(0)  # a rank that ends while the other one connects would be a lost connection
dist.stop()
"""


@pytest.mark.parametrize(("pods", "threads"), [(False, 3), (True, 6)])
def test_ranks_share_the_cores_of_their_own_machine(pods: bool, threads: int, run_ranks) -> None:
    for result in run_ranks(2, ["-c", THREADS.format(pods=pods)]):
        assert result.stdout == f"{threads}\n", result.stderr


def test_the_reason_of_a_failed_set_up_is_reported(run_ranks) -> None:
    (result,) = run_ranks(1, ["-c", "import os; os.environ['GLOO_SOCKET_IFNAME'] = 'eth7'" + ALONE])
    assert result.returncode == 1
    assert "cannot be set up" in result.stderr
    assert "Unable to find address for: eth7" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_machine_without_a_loopback_interface_is_named(ranks: int, launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    def fail(**_: object) -> None:
        raise RuntimeError("[enforce fail] ifa != nullptr. Unable to find interface for: [127.0.0.1]")

    launcher(MASTER_ADDR="localhost", MASTER_PORT="12345")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(UserError, match=r"the loopback interface of this machine is down.*ip link set lo up") as error:
        dist.start(dist.Ranks(0, ranks, 0, ranks), timeout_s=1)
    assert error.value.exit_code == 2  # a restart does not help


@pytest.mark.parametrize(("limit", "ranks", "needed"), [(64, 1, 65), (100, 1000, 128)])
def test_too_few_open_files_are_named_with_the_remedy(
    limit: int, ranks: int, needed: int, launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher()
    monkeypatch.setattr(rendezvous, "open_files_limit", lambda: limit)
    with pytest.raises(UserError, match=rf"{limit} open files, and needs {needed} at least; raise .*ulimit -n"):
        dist.start(dist.Ranks(0, ranks, 0, ranks), timeout_s=1)


@pytest.mark.parametrize(("threads", "needed"), [("1", 8), ("4", 14)])
def test_too_few_threads_are_named_with_the_remedy(
    threads: str, needed: int, launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher()
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(threads))
    monkeypatch.setattr(rendezvous, "threads_that_start", lambda wanted: 5)
    with pytest.raises(UserError, match=rf"{needed} more processes and threads.* allows 5 more; raise .*pids.max"):
        dist.start(dist.Ranks(), timeout_s=1)


def test_a_process_on_its_own_agrees_with_itself() -> None:
    assert dist.agree_on_max(3, 1) == (3, 1)
    assert dist.broadcast_from_rank0("x") == "x"
    assert dist.gather_to_all("x") == ["x"]
    assert dist.on_rank0(lambda: "x", dist.Ranks()) == "x"


@pytest.mark.parametrize("error", [UserError("one", "two"), OSError(13, "Permission denied", "file")])
def test_errors_are_agreed_on(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(dist.AgreedError) as agreed:
        dist.same_errors_on_all(fail)
    assert "Permission denied" in str(agreed.value) or agreed.value.problems == ("one", "two")
    assert agreed.value.exit_code == 2


def test_transient_errors_have_the_exit_code_of_a_crash() -> None:
    def fail() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(dist.AgreedError) as agreed:
        dist.same_errors_on_all(fail)
    assert agreed.value.exit_code == 1


ON_RANK_0 = """
from bfsys import dist
from bfsys.errors import UserError, exit_code_of
from bfsys.ranks import ranks_from_environment

def main():
    ranks = ranks_from_environment()
    dist.start(ranks, timeout_s=900)
    asked = []

    def act():
        asked.append(ranks.rank)
        return {"by": ranks.rank}

    print(dist.on_rank0(act, ranks), dist.on_rank0(lambda: None, ranks), asked, flush=True)

    def fail():
        raise UserError("no such file", exit_code=65)

    dist.on_rank0(fail, ranks)

dist.hard_exit(exit_code_of(main))
"""


def test_results_and_errors_of_rank_0_are_shared(run_ranks) -> None:
    first, second = run_ranks(2, ["-c", ON_RANK_0])
    assert first.stdout == "{'by': 0} None [0]\n", first.stderr
    assert second.stdout == "{'by': 0} None []\n", second.stderr
    for rank in (first, second):
        assert (rank.returncode, rank.stderr) == (65, "error: no such file\n")


def test_a_node_that_joins_later_meets_ranks_that_were_started_again(run_ranks) -> None:
    """torchrun counts the restarts of each node separately."""
    count = "import os; os.environ['TORCHELASTIC_RESTART_COUNT'] = os.environ['RANK']\n"
    for rank in run_ranks(2, ["-c", count + ON_RANK_0]):
        assert rank.returncode == 65, rank.stderr


GATHERED = """
import math, torch
import torch.distributed as flat
from bfsys import dist
from bfsys.errors import exit_code_of
from bfsys.ranks import ranks_from_environment

def main():
    ranks = ranks_from_environment()
    dist.start(ranks, timeout_s=900)
    for step in range(5):
        mine = [1 / (3 + ranks.rank + step), ranks.rank == step, math.nan if ranks.rank == 1 else -0.0]
        rows = torch.empty(ranks.world_size, 3, dtype=torch.float64)
        flat.all_gather(list(rows.unbind()), torch.tensor(mine, dtype=torch.float64))
        gathered = dist.gather_numbers(mine)
        assert gathered.numpy().tobytes() == rows.numpy().tobytes(), (gathered, rows)
        total = dist.sum_over_ranks(torch.tensor(mine, dtype=torch.float64))
        assert total.numpy().tobytes() == rows.sum(0).numpy().tobytes(), (total, rows)
    words = [chr(97 + rank) * (5 - rank) for rank in range(ranks.world_size)]
    assert dist.gather_to_all(words[ranks.rank]) == words
    assert dist.gather_to_rank0(words[ranks.rank]) == (words if ranks.rank == 0 else [])
    print(dist.agree_on_max(ranks.rank, -ranks.rank, 2**53 if ranks.rank == 1 else 0))

dist.hard_exit(exit_code_of(main))
"""


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_numbers_of_all_ranks_are_those_of_a_flat_gather_bit_for_bit(run_ranks, world_size: int) -> None:
    for rank in run_ranks(world_size, ["-c", GATHERED]):
        assert (rank.returncode, rank.stdout) == (0, f"{(world_size - 1, 0, 2**53)}\n"), rank.stderr


@pytest.mark.parametrize(("ranks", "rounds"), [(1, 0), (2, 1), (3, 2), (8, 3), (1000, 10), (1024, 10)])
def test_a_gather_takes_as_many_rounds_as_the_logarithm_of_the_ranks(ranks: int, rounds: int) -> None:
    exchange = dist.RowExchange([5], torch.float64, ranks, 0)
    assert len(exchange.rounds) == rounds
    assert sum(len(each.arriving) for each in exchange.rounds) == ranks - 1
    assert [len(each.leaving) for each in exchange.rounds] == [len(each.arriving) for each in exchange.rounds]


@pytest.mark.parametrize("on_demand", ["0", "1"])
def test_ranks_that_connect_on_demand_agree_too(run_ranks, on_demand: str) -> None:
    chosen = f"import os; os.environ['TORCH_GLOO_LAZY_INIT'] = '{on_demand}'\n"
    for rank in run_ranks(3, ["-c", chosen + GATHERED]):
        assert rank.returncode == 0, rank.stderr
