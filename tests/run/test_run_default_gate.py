"""A night without labels and without a word of agreement: what the default says, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import dfmpc
from dfmpc.artifact.latest import read_latest
from dfmpc.job.gates import SAFE_AGREEMENT
from dfmpc.report.parts import read_models
from dfmpc.run.store import find_run

R2: dict[str, object] = {"name": "r2", "method": "rtn", "bits": 2}
R8: dict[str, object] = {"name": "r8", "method": "rtn", "bits": 8}
CPU = {"devices": "cpu"}


def test_what_agrees_too_little_is_marked_and_published_all_the_same(bench: Any) -> None:
    models = [bench.model("net"), {**bench.model("off"), "gates": {"min_agreement": None}}]
    ended = dfmpc.run(bench.job(models, [R2, R8], resources=CPU), progress=False)
    assert ended.exit_code == 0
    rows = {row.task: row for row in read_models(find_run(bench.store).path)}
    for task in ("net/r2", "net/r8"):
        row = rows[task]
        assert (row.measured_on, row.images, row.top1_after) == ("synthetic", 128, None)
        assert row.agreement is not None
        assert row.kl is not None
        assert row.gate == ("warn" if row.agreement < SAFE_AGREEMENT else "pass")
        assert read_latest(bench.store / "latest" / task).artifact == row.artifact
    low, high = rows["net/r2"], rows["net/r8"]
    assert (low.gate, high.gate) == ("warn", "pass")
    assert low.kl is not None
    assert high.kl is not None
    assert low.kl > 10 * high.kl > 0
    assert low.gate_reason == (
        f"agreement is {low.agreement:.4f}, min_agreement warns at {SAFE_AGREEMENT:g}, "
        "the default without labels (docs/fidelity.md)"
    )
    assert {rows["off/r2"].gate, rows["off/r8"].gate} == {"none"}


def test_the_next_night_the_job_may_switch_it_off_or_bound_it_and_nothing_is_compressed_again(bench: Any) -> None:
    models = [bench.model("net")]
    dfmpc.run(bench.job(models, [R2], resources=CPU), progress=False)
    off = dfmpc.run(bench.job(models, [R2], gates={"min_agreement": None}, resources=CPU), progress=False)
    assert [(row.status, row.gate, row.gate_reason) for row in off.rows] == [("reused", "none", None)]
    bound = dfmpc.run(bench.job(models, [R2], gates={"min_agreement": 0.99}, resources=CPU), progress=False)
    assert [(row.status, row.gate) for row in bound.rows] == [("reused", "fail")]
    assert bound.exit_code == 3
