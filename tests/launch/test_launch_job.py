"""From options to the ranks of a node and their environments; the ladder of signals."""

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.errors import ConfigError
from distrain.core.vocabulary import Degrees
from distrain.launch.agent import LOST_PEER_SETTLE_S, SETTLE_S
from distrain.launch.emulate import exit_code, node_options
from distrain.launch.job import Seat, plan_workers
from distrain.launch.options import LaunchOptions, check
from distrain.launch.placement import in_order
from distrain.launch.stopping import Ladder
from distrain.planners.parallel_plan import ParallelPlan

SEAT = Seat(node_rank=1, nodes=("a", "b"), nprocs=(2, 3), master_addr="host", master_port=7)
OPTIONS = LaunchOptions(command=("true",), nproc=3, run_id="job", role="trainer")


def plan_file(path: Path, *, placement: tuple[tuple[int, ...], ...], world_size: int = 4) -> str:
    plan = ParallelPlan(world_size=world_size, degrees=Degrees(dp=world_size), placement=placement)
    plan.save(path / "plan.json")
    return str(path / "plan.json")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_in_order_every_rank_is_placed_once_and_counts_on_from_node_to_node(nprocs: list[int]) -> None:
    placement = in_order(nprocs)
    assert [len(ranks) for ranks in placement] == nprocs
    assert [rank for ranks in placement for rank in ranks] == list(range(sum(nprocs)))


def test_nodes_may_differ_in_their_number_of_ranks() -> None:
    specs = plan_workers(OPTIONS, SEAT, environ={"HOME": "/home"})
    assert [(spec.rank, spec.local_rank) for spec in specs] == [(2, 0), (3, 1), (4, 2)]
    env = specs[1].env
    assert {key: env[key] for key in ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK")} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "ROLE_RANK": "3",
    }
    assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["GROUP_WORLD_SIZE"]) == ("5", "3", "2")
    assert (env["DISTRAIN_NODE"], env["ROLE_NAME"], env["HOME"]) == ("b", "trainer", "/home")
    assert "DISTRAIN_PLAN" not in env


def test_ranks_are_placed_by_the_plan(tmp_path: Path) -> None:
    plan = plan_file(tmp_path, placement=((0, 3), (2, 1)))
    options = LaunchOptions(command=("true",), nproc=2, plan=plan)
    seat = Seat(node_rank=1, nodes=("a", "b"), nprocs=(2, 2), master_addr="host", master_port=7)
    specs = plan_workers(options, seat, environ={})
    assert [(spec.rank, spec.local_rank) for spec in specs] == [(2, 0), (1, 1)]
    assert specs[0].env["DISTRAIN_PLAN"] == plan


@pytest.mark.parametrize(
    ("placement", "world_size", "messages"),
    [
        ((), 8, ["another number of ranks"]),
        (((0, 1, 2, 3),), 4, ["another number of nodes", "ranks on node 0"]),
        (((0, 1, 2), (3,)), 4, ["ranks on node 0", "ranks on node 1"]),
    ],
)
def test_a_plan_for_other_nodes_is_refused_with_every_reason(
    placement: tuple[tuple[int, ...], ...], world_size: int, messages: list[str], tmp_path: Path
) -> None:
    plan = plan_file(tmp_path, placement=placement, world_size=world_size)
    found = check(LaunchOptions(command=("true",), nproc=2, emulate_nodes=2, plan=plan))
    text = "\n".join(map(str, found))
    assert all(message in text for message in messages)


def test_each_rank_sees_its_own_device_as_device_0() -> None:
    options = LaunchOptions(command=("true",), nproc=3, virtual_local_rank=True)
    specs = plan_workers(options, SEAT, environ={"CUDA_VISIBLE_DEVICES": "4, 5,6"})
    assert [spec.env["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["4", "5", "6"]
    assert {spec.env["LOCAL_RANK"] for spec in specs} == {"0"}
    assert [spec.env["CUDA_VISIBLE_DEVICES"] for spec in plan_workers(options, SEAT, environ={})] == [
        "0",
        "1",
        "2",
    ]
    with pytest.raises(ConfigError, match="one visible device a rank"):
        plan_workers(options, SEAT, environ={"CUDA_VISIBLE_DEVICES": "4"})


def test_a_setting_of_the_user_for_nccl_is_kept() -> None:
    key = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    assert plan_workers(OPTIONS, SEAT, environ={})[0].env[key] == "1"
    assert plan_workers(OPTIONS, SEAT, environ={key: "0"})[0].env[key] == "0"


def test_emulated_nodes_have_names_of_one_width_and_meet_on_one_port() -> None:
    nodes = node_options(LaunchOptions(command=("true",), emulate_nodes=11), port=7)
    assert [node.node_rank for node in nodes] == list(range(11))
    assert {len(node.node_name) for node in nodes} == {6}
    assert {(node.nnodes, node.emulate_nodes, node.master_addr, node.master_port) for node in nodes} == {
        (11, 1, "127.0.0.1", 7)
    }


def test_one_killed_agent_fails_the_job() -> None:
    assert exit_code([0, 0]) == 0
    assert exit_code([0, -9]) == 1
    assert exit_code([130, 130]) == 130
    assert exit_code([3, 1]) == 1


def test_after_a_failure_sigterm_comes_at_once_and_sigkill_after_the_grace() -> None:
    ladder = Ladder.after_failure(grace_s=5.0, now=100.0)
    assert ladder.due(now=100.0) == [signal.SIGTERM]
    assert ladder.due(now=104.9) == []
    assert ladder.next_at == 105.0
    assert ladder.due(now=105.0) == [signal.SIGKILL]
    assert 105.0 < ladder.gives_up_at < 115.0


def test_ten_seconds_after_a_failure_everything_has_been_killed() -> None:
    ladder = Ladder.after_failure(grace_s=None, now=0.0)
    ladder.due(now=0.0)
    assert max(SETTLE_S, LOST_PEER_SETTLE_S) + ladder.next_at < 10.0


def test_ctrl_c_reaches_the_ranks_as_it_is_and_each_further_one_hurries() -> None:
    ladder = Ladder.after_signal(signal.SIGINT, grace_s=None, now=0.0)
    assert ladder.due(now=0.0) == [signal.SIGINT]
    ladder.hurry(now=1.0)
    assert ladder.due(now=1.0) == [signal.SIGTERM]
    ladder.hurry(now=2.0)
    assert ladder.due(now=2.0) == [signal.SIGKILL]


def test_sigterm_leaves_time_for_a_last_checkpoint() -> None:
    ladder = Ladder.after_signal(signal.SIGTERM, grace_s=None, now=0.0)
    assert ladder.due(now=0.0) == [signal.SIGTERM]
    assert ladder.next_at >= 30.0
