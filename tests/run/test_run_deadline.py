"""When a run has to be over, and what is started before that."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from dfmpc.errors import UsageError
from dfmpc.run.schedule.deadline import Deadline, parse_deadline

DURATIONS = {
    "900": 900.0,
    "900s": 900.0,
    "0": 0.0,
    "1.5s": 1.5,
    "30m": 1800.0,
    "2h30m": 9000.0,
    "1d1h1m1s": 90061.0,
    " 2h ": 7200.0,
}


@pytest.mark.parametrize("text", DURATIONS)
def test_a_duration_counts_from_now(text: str) -> None:
    before = time.time()
    at = parse_deadline(text, {})
    assert at is not None
    assert before + DURATIONS[text] <= at <= time.time() + DURATIONS[text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-31T06:00:00+00:00", 1769839200.0),
        ("2026-01-31T06:00:00", 1769839200.0),
        ("2026-01-31T07:00:00+01:00", 1769839200.0),
        ("2026-01-31", 1769817600.0),
    ],
)
def test_a_time_is_taken_as_it_stands_in_utc_where_it_does_not_say(text: str, expected: float) -> None:
    assert parse_deadline(text, {}) == expected
    assert datetime.fromtimestamp(expected, UTC) - datetime(2026, 1, 31, tzinfo=UTC) in (
        timedelta(0),
        timedelta(hours=6),
    )


def test_auto_is_the_end_of_the_slurm_job() -> None:
    assert parse_deadline("auto", {"SLURM_JOB_END_TIME": "1769839200"}) == 1769839200.0
    assert parse_deadline("auto", {}) is None
    assert parse_deadline("auto", {"SLURM_JOB_END_TIME": "UNLIMITED"}) is None
    assert parse_deadline(None, {"SLURM_JOB_END_TIME": "1769839200"}) is None


@pytest.mark.parametrize("text", ["", " ", "soon", "2h30", "m30", "-5m", "1h2d", "2026-13-01", "5 minutes", "inf"])
def test_anything_else_is_refused_with_what_would_do(text: str) -> None:
    with pytest.raises(UsageError, match=r"give a duration such as 2h30m, a time such as .*, or auto"):
        parse_deadline(text, {})


def test_without_a_deadline_everything_may_start() -> None:
    deadline = Deadline(None, 20.0)
    deadline.observe("p", 1, 1e9)
    assert deadline.left_s() is None
    assert deadline.allows("p", 2**60)


def test_what_is_kept_for_ending_in_order_is_not_for_work() -> None:
    end = time.time() + 100
    left = Deadline(end, 30.0).left_s()
    assert left is not None
    assert end - 30 - time.time() <= left <= 70
    assert not Deadline(time.time() + 10, 30.0).allows("p", 1)


def test_where_nothing_is_known_it_starts_and_then_the_slowest_decides() -> None:
    deadline = Deadline(time.time() + 100, 0.0)
    assert deadline.allows("p", 10**9)
    deadline.observe("p", 1000, 10.0)
    deadline.observe("p", 1000, 1.0)
    assert deadline.allows("p", 6000)  # 10 s a 1000 bytes, half as much again for safety: 90 s
    assert not deadline.allows("p", 7000)
    assert not deadline.allows("q", 7000)  # nothing is known of q, so it is as slow as the slowest
    deadline.observe("q", 1000, 2.0)
    assert deadline.allows("q", 7000)


def test_a_task_can_wait_as_long_as_it_would_still_end_in_time() -> None:
    assert Deadline(None, 0.0).slack_s("p", 10) is None
    deadline = Deadline(time.time() + 100, 20.0)
    assert deadline.slack_s("p", 10) == pytest.approx(80, abs=5)
    deadline.observe("p", 10, 20.0)
    assert deadline.slack_s("p", 10) == pytest.approx(50, abs=5)
    assert deadline.slack_s("p", 20) == pytest.approx(20, abs=5)
    assert not deadline.allows("p", 40)


def test_a_model_without_a_size_is_no_division_by_zero() -> None:
    deadline = Deadline(time.time() + 100, 0.0)
    deadline.observe("p", 0, 50.0)
    assert deadline.allows("p", 1)
    assert not deadline.allows("p", 2)
