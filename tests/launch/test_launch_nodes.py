"""Several nodes: emulated ones, and agents started one by one as on a cluster."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distrain.core.vocabulary import REPORT, Degrees
from distrain.planners.parallel_plan import ParallelPlan

pytestmark = pytest.mark.processes
Launch = Callable[..., Any]
Script = Callable[[str], str]
AllGone = Callable[[list[int]], None]

KEYS = [
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "DISTRAIN_NODE",
]
SHOW = f"import json; print(json.dumps([os.environ[key] for key in {KEYS}]))"
SLEEP = "print('pid', os.getpid(), flush=True); time.sleep(100)"


@pytest.fixture
def port() -> Iterator[str]:
    """A port that nobody else is given while the test runs: bound, but not listening."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield str(holder.getsockname()[1])


def shown(*jobs: Any) -> list[list[str]]:
    """What SHOW printed, by rank, without the prefix."""
    lines = [line.partition("] ")[2] for job in jobs for line in job.lines]
    return sorted((json.loads(line) for line in lines), key=lambda values: int(values[0]))


def test_emulated_nodes_look_like_nodes(launch: Launch, script: Script) -> None:
    job = launch("--nproc-per-node", "2", "--emulate-nodes", "2", script(SHOW))
    assert job.wait() == 0
    assert shown(job) == [
        [str(rank), str(rank % 2), str(rank // 2), "4", "2", "2", f"node{rank // 2}"] for rank in range(4)
    ]
    assert {line.partition("]")[0] for line in job.lines} == {
        f"[node{rank // 2} rank {rank}" for rank in range(4)
    }


def test_a_plan_places_the_ranks(launch: Launch, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ParallelPlan(world_size=4, degrees=Degrees(tp=2, dp=2), placement=((3, 0), (1, 2))).save(path)
    show = script(SHOW.replace("DISTRAIN_NODE", "DISTRAIN_PLAN"))
    job = launch(
        "--nproc-per-node",
        "2",
        "--emulate-nodes",
        "2",
        "--plan",
        os.path.relpath(path, tmp_path / "job0"),
        show,
    )
    assert job.wait() == 0
    places = {int(values[0]): (values[2], values[1], values[-1]) for values in shown(job)}
    plan = str(path)
    assert places == {3: ("0", "0", plan), 0: ("0", "1", plan), 1: ("1", "0", plan), 2: ("1", "1", plan)}


def test_a_plan_that_does_not_fit_starts_nothing(launch: Launch, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ParallelPlan(world_size=4, degrees=Degrees(dp=4), placement=((0, 1, 2, 3),)).save(path)
    job = launch("--nproc-per-node", "3", "--emulate-nodes", "2", "--plan", str(path), script(SHOW))
    assert job.wait() == 3
    assert job.out == b""
    for message in ("another number of ranks", "another number of nodes", "on node 0"):
        assert message in job.err


def test_a_failing_rank_stops_all_nodes(launch: Launch, script: Script, all_gone: AllGone) -> None:
    job = launch("--nproc-per-node", "2", "--emulate-nodes", "2", script(f"if rank == 3: 1/0\n{SLEEP}"))
    assert job.wait() == 1
    all_gone(job.pids())
    assert job.err.count("failed first") == 1
    story = job.err[job.err.index("error: rank 3 failed first: exit code 1") :]
    assert "on node1, local rank 1" in story
    assert "ZeroDivisionError" in story
    assert "others: 3 ranks (0-2) stopped by the launcher" in story


@pytest.mark.parametrize("victim", [0, 1])
def test_the_loss_of_an_agent_stops_all_nodes(
    victim: int, launch: Launch, script: Script, all_gone: AllGone, tmp_path: Path
) -> None:
    job = launch(
        "--nproc-per-node",
        "1",
        "--emulate-nodes",
        "2",
        script(f"print('agent', rank, os.getppid())\n{SLEEP}"),
        env={REPORT: str(tmp_path / "report.json")},
    )
    job.until("pid", times=2)
    agents = {int(rank): int(pid) for rank, pid in re.findall(r"agent (\d) (\d+)", job.out.decode())}
    os.kill(agents[victim], signal.SIGKILL)
    assert job.wait() == 1
    all_gone(job.pids())
    assert f"node{victim} is lost" in job.err
    assert [each["node"] for each in json.loads((tmp_path / "report.json").read_text())["lost"]] == [victim]


def test_ctrl_c_stops_all_nodes(launch: Launch, script: Script, all_gone: AllGone) -> None:
    job = launch("--nproc-per-node", "2", "--emulate-nodes", "2", script(SLEEP))
    job.until("pid", times=4)
    job.send(signal.SIGINT)
    assert job.wait() == 130
    all_gone(job.pids())


def static(node_rank: int, port: str, nproc: int = 1) -> list[str]:
    meeting = ["--nnodes", "2", "--node-rank", str(node_rank), "--master-port", port]
    return [*meeting, "--nproc-per-node", str(nproc)]


def c10d(port: str, run_id: str = "j", conf: str = "join_timeout=20") -> list[str]:
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    return [*meeting, "--rdzv-id", run_id, "--rdzv-conf", conf]


def test_static_nodes_meet_whoever_comes_first_and_may_differ_in_ranks(
    port: str, launch: Launch, script: Script
) -> None:
    path = script(SHOW.replace("DISTRAIN_NODE", "MASTER_PORT"))
    second = launch(*static(1, port, nproc=2), path)
    first = launch(*static(0, port), path)
    assert [first.wait(), second.wait()] == [0, 0]
    assert shown(first, second) == [
        ["0", "0", "0", "3", "1", "2", port],
        ["1", "0", "1", "3", "2", "2", port],
        ["2", "1", "1", "3", "2", "2", port],
    ]


def test_c10d_numbers_nodes_by_arrival(port: str, launch: Launch, script: Script) -> None:
    path = script(SHOW.replace("DISTRAIN_NODE", "TORCHELASTIC_RUN_ID"))
    jobs = [launch(*c10d(port), path) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert shown(*jobs) == [["0", "0", "0", "2", "1", "2", "j"], ["1", "0", "1", "2", "1", "2", "j"]]


def test_a_failure_on_one_node_ends_the_other_with_the_same_code_and_a_hint(
    port: str, launch: Launch, script: Script, all_gone: AllGone
) -> None:
    path = script(f"if rank == 1: 1/0\n{SLEEP}")
    first, second = launch(*static(0, port), path), launch(*static(1, port), path)
    assert [first.wait(), second.wait()] == [1, 1]
    all_gone(first.pids() + second.pids())
    assert "rank 1 failed first" in first.err
    assert "ZeroDivisionError" in first.err
    assert "the job failed: rank 1 on" in second.err


def test_a_node_that_is_done_waits_for_the_others_verdict(port: str, launch: Launch, script: Script) -> None:
    path = script(
        "while rank == 1 and not os.path.exists('go'): time.sleep(0.01)\nprint('done'); sys.exit(rank * 5)"
    )
    first, second = launch(*static(0, port), path), launch(*static(1, port), path)
    first.until("done")
    assert first.process.poll() is None
    (second.folder / "go").touch()
    assert [first.wait(), second.wait()] == [1, 1]
    assert "rank 1 failed first: exit code 5" in first.err


def test_sigterm_to_one_agent_stops_every_node(
    port: str, launch: Launch, script: Script, all_gone: AllGone
) -> None:
    path = script(SLEEP)
    first, second = launch(*static(0, port), path), launch(*static(1, port), path)
    first.until("pid")
    second.until("pid")
    second.send(signal.SIGTERM)
    assert [first.wait(), second.wait()] == [143, 143]
    all_gone(first.pids() + second.pids())


def test_a_node_of_another_job_is_refused_with_the_reason(port: str, launch: Launch, script: Script) -> None:
    path = script("print('ran')")
    first = launch(*c10d(port), path)
    other = launch(*c10d(port, "k", "is_host=false,join_timeout=20"), path)
    assert other.wait() == 1
    assert "this is job 'j' (--rdzv-id), not 'k'" in other.err
    assert other.out == b""
    assert launch(*c10d(port), path).wait() == 0
    assert first.wait() == 0


def test_a_node_that_never_comes_is_named(port: str, launch: Launch, script: Script) -> None:
    job = launch(*c10d(port, "j", "join_timeout=0.2"), script("print('ran')"))
    assert job.wait() == 1
    assert "1 of 2 nodes" in job.err
    lonely = launch(*static(1, port), "--rdzv-conf", "join_timeout=0.2", script("print('ran')"))
    assert lonely.wait() == 1
    assert "node 0 could not be reached" in lonely.err


def test_a_port_in_use_is_found_before_anything_starts(launch: Launch, script: Script) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        jobs = [
            launch("--master-port", port, *more, script("print('ran')"))
            for more in ([], ["--emulate-nodes", "2"])
        ]
        assert [job.wait() for job in jobs] == [3, 3]
    for job in jobs:
        assert job.err.startswith(f"error: the port is in use\ngot: 127.0.0.1:{port}\n")
        assert job.out == b""


def test_an_address_of_another_machine_is_found_before_anything_starts(
    launch: Launch, script: Script
) -> None:
    job = launch("--master-addr", "192.0.2.1", "--master-port", "0", script("print('ran')"))
    assert job.wait() == 3
    assert "not one of this node's" in job.err
    assert (
        launch("--master-addr", "no.such.host.invalid", "--master-port", "0", script("print()")).wait() == 3
    )
