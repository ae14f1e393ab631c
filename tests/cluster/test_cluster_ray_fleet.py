"""What is asked of a Ray cluster: parts of GPUs, memory, how many orders, where each goes; none is needed here."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.job.task import Task
from dfmpc.run.cluster.ray_connect import connected
from dfmpc.run.cluster.ray_fleet import Fleet, Lane
from dfmpc.run.cluster.ray_resources import Node, Wants, gpu_share, seats, wants_of
from dfmpc.run.cluster.ray_task import Sign
from dfmpc.run.failures import Mode
from dfmpc.run.schedule.board import Item

GB = 10**9


def _node(name: str, cpus: float = 4, gpus: float = 0, gpu_bytes: float | None = None) -> Node:
    return Node(name, f"host-{name}", cpus, gpus, 10 * GB, gpu_bytes)


@pytest.fixture
def task(bench: Any) -> Task:
    return expand(load_job(bench.job([bench.model("a")], [{"name": "r4", "method": "rtn", "bits": 4}])))[0]


def _item(task: Task, host: float = GB, device: float = GB) -> Item:
    return Item(task, 1000, host, device)


@pytest.mark.parametrize(
    ("device_bytes", "gpu_bytes", "share"),
    [
        (1, 80 * GB, 0.125),
        (9 * GB, 80 * GB, 0.125),
        (9.1 * GB, 80 * GB, 0.25),
        (71 * GB, 80 * GB, 1),
        (200 * GB, 80 * GB, 1),
        (1, None, 1),
    ],
)
def test_a_gpu_is_lent_in_eighths_of_nine_tenths_of_its_memory(
    device_bytes: float, gpu_bytes: float | None, share: float
) -> None:
    assert gpu_share(device_bytes, gpu_bytes) == share


def test_a_task_asks_for_its_memory_but_never_for_more_than_a_node_has(task: Task) -> None:
    nodes = [_node("a"), _node("b", gpus=1, gpu_bytes=40 * GB), _node("c", gpus=1, gpu_bytes=80 * GB)]
    assert wants_of(_item(task), 2, nodes, on_gpu=False) == Wants(2, 0, GB)
    assert wants_of(_item(task, host=50 * GB), 2, nodes, on_gpu=False).memory == 10 * GB
    assert wants_of(_item(task, device=9 * GB), 2, nodes, on_gpu=True) == Wants(2, 0.25, GB)
    alone = _item(task)
    alone.history.mode = Mode(alone=True)
    assert wants_of(alone, 2, nodes, on_gpu=True) == Wants(2, 1, 10 * GB)
    fallen = _item(task)
    fallen.history.mode = Mode(on_cpu=True)
    assert wants_of(fallen, 2, nodes, on_gpu=True) == Wants(2, 0, GB)


def test_seats_are_what_the_scarcest_resource_allows() -> None:
    node = _node("a", cpus=16, gpus=2)
    assert seats(node, Wants(1, 0, GB)) == 10
    assert seats(node, Wants(4, 0, GB)) == 4
    assert seats(node, Wants(4, 0.25, 1)) == 4
    assert seats(node, Wants(1, 1, 1)) == 2
    assert seats(_node("b"), Wants(1, 0.5, 1)) == 0


def test_lanes_follow_the_nodes_and_keep_what_is_out(task: Task) -> None:
    fleet = Fleet(threads=1, on_gpu=False)
    assert fleet.update([_node("a"), _node("b")], [_item(task)]) == set()
    assert len(fleet.lanes) == 4 + 4
    for number, lane in enumerate(fleet.lanes[:7]):
        lane.fill(_item(task), number)
    assert fleet.update([_node("b")], []) == {"a"}
    assert (len(fleet.busy), len(fleet.lanes)) == (7, 7)
    for lane in fleet.busy[:6]:
        lane.clear()
    assert fleet.update([_node("b")], []) == set()
    assert (len(fleet.busy), len(fleet.lanes)) == (1, 4)
    fleet.update([_node("b"), _node("c")], [])
    assert sorted(lane.name for lane in fleet.lanes) == list(range(8))
    assert fleet.update([], []) == {"b", "c"}
    assert len(fleet.lanes) == 1, "something is always asked for, so that a cluster that grows by demand does"


def test_a_lane_stays_on_its_node_while_there_is_room(task: Task) -> None:
    fleet, item = Fleet(threads=2, on_gpu=False), _item(task)
    fleet.update([_node("a"), _node("b")], [item])
    lane, other = fleet.lanes[0], fleet.lanes[1]
    assert fleet.place(lane, item) is None
    lane.fill(item, 1)
    lane.hear(Sign(1, "attempt", "a", "cpu", begun=True))
    lane.clear()
    assert fleet.place(lane, item) == "a"
    assert fleet.place(other, item) is None
    for each in fleet.lanes[1:3]:  # both seats of the node are taken
        each.fill(item, 2)
        each.node = "a"
    assert fleet.place(lane, item) is None


def test_a_node_whose_gpu_failed_is_avoided_and_in_the_end_left_alone(task: Task) -> None:
    cordoned: set[str] = set()
    fleet, item = Fleet(threads=1, on_gpu=True, cordoned=cordoned), _item(task)
    fleet.update([_node("a", gpus=2), _node("b", gpus=1), _node("c")], [item])
    assert fleet.afresh, "two GPUs on a node"
    fleet.homes |= {"cuda:0@host-a": "a", "cuda:0@host-b": "b"}
    item.avoid.add("cuda:0@host-a")
    assert fleet.place(fleet.lanes[0], item) == "b"
    cordoned.add("cuda:0@host-b")
    assert fleet.place(fleet.lanes[0], item) == "a", "to be avoided is less than cordoned"
    assert fleet.usable
    cordoned.add("cuda:0@host-a")
    assert not fleet.usable


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "give auto or HOST:PORT"),
        ("head", "give auto or HOST:PORT"),
        ("127.0.0.1:1", "nobody answers"),
        ("127.0.0.1:99999", "nobody answers"),
    ],
)
def test_an_address_where_no_cluster_can_be_is_refused_at_once(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said), connected(address):
        pass


def test_without_ray_the_remedy_is_named_and_nothing_starts(bench: Any) -> None:
    job = bench.job([bench.model("a")], [{"name": "r4", "method": "rtn", "bits": 4}])
    code = f"import sys; sys.modules['ray'] = None; sys.argv = {['dfmpc', 'run', str(job), '--executor', 'ray']!r}"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}; from dfmpc.cli import main; main()"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    assert "--executor ray needs Ray" in ended.stderr
    assert "pip install 'dfmpc[ray]'" in ended.stderr
    assert not Path(bench.store).exists()


def test_a_stopped_command_counts_nothing_against_its_processes(task: Task) -> None:
    fleet = Fleet(threads=1, on_gpu=False, lanes=[Lane(0), Lane(1)])
    fleet.lanes[0].item = _item(task)
    fleet.lanes[0].since = 10.0
    fleet.excuse(0.5)
    assert [(lane.since, lane.heard) for lane in fleet.lanes] == [(10.0, 0.0), (0.0, 0.0)]
    before = time.monotonic()
    fleet.excuse(30.0)
    assert fleet.lanes[0].since == 40.0
    assert fleet.lanes[0].heard >= before, "silence begins anew"
    assert fleet.lanes[1].heard == 0.0
