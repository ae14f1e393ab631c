"""The page for a pull request or a mail, whole."""

from __future__ import annotations

from datetime import UTC, datetime

from dfmpc.report.markdown import plain, to_markdown
from dfmpc.report.rows import ModelRow
from dfmpc.report.verdict import RunFacts, duration, headline, size, totals, worst_first

NOON = datetime(2025, 1, 2, 12, 0, tzinfo=UTC)


def row(model: str, **changes: object) -> ModelRow:
    task = {"run": "r", "task": f"{model}/p", "model": model, "bit_plan": "p", "method": "rtn", "finished_at": NOON}
    return ModelRow(**(task | {"status": "done"} | changes))  # type: ignore[arg-type]


SIZES = {"bytes_before": 4 * 2**20, "bytes_after": 2**20, "ratio": 4.0}
ROWS = [
    row("fine", **SIZES, top1_before=91.0, top1_after=90.75, agreement=0.95, gate="pass"),
    row("bare", **SIZES, agreement=0.75, gate="none", status="reused"),
    row("bad", **SIZES, top1_before=91.0, top1_after=80.0, agreement=0.8, gate="fail", gate_reason="fell by 11"),
    row("gone", status="failed", error_class="CheckpointError", error="no | such\nfile", failure="io", attempts=3),
]
FACTS = RunFacts(
    "runs/r", "night_ly", wall_s=3725.0, rest={"waiting": ("a/p", "b/p")}, log_tails={"gone/p": ("x <b>",)}
)


def test_the_whole_page():
    assert (
        to_markdown(FACTS, ROWS)
        == r"""## ❌ night\_ly: 1 task failed, 1 gate closed, 2 tasks without a result

- 4 models, 4 tasks: 2 done, 1 failed, 1 reused
- 12.0 MiB → 3.00 MiB (4.00 times smaller; a model counts once a task)
- largest loss of top-1: 11.00 points, bad/p
- least agreement without labels: 0.750, bare/p
- gates: 1 fail, 1 pass
- wall time: 1 h 2 min

| task | status | gate | MiB before | MiB after | ratio | top-1 % before | top-1 % after | drop | agreement |
| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: | --: |
| gone/p | failed |  |  |  |  |  |  |  |  |
| bad/p | done | fail | 4.00 | 1.00 | 4.00 | 91.00 | 80.00 | 11.00 | 0.800 |
| fine/p | done | pass | 4.00 | 1.00 | 4.00 | 91.00 | 90.75 | 0.25 | 0.950 |
| bare/p | reused |  | 4.00 | 1.00 | 4.00 |  |  |  | 0.750 |

### Failures

**gone/p** failed (io, tried 3 times): CheckpointError: no \| such

    x <b>

### Gates

- fail: bad/p: fell by 11

### Without a result

- waiting: a/p, b/p

Run: `runs/r`
"""
    )


def test_names_are_no_markup():
    name = "a|b\n# <img src=x> [x](http://y) `c` @all *d*"
    text = to_markdown(RunFacts("``r`", name), [row(name)])
    assert plain(name) == r"a\|b \# \<img src=x\> \[x\]\(http://y\) \`c\` \@all \*d\*"
    assert f"| {plain(name)}/p | done |" in text
    assert text.startswith(f"## ✅ {plain(name)}: 1 task done\n")
    assert text.endswith("Run: ``` ``r` ```\n")


def test_a_run_without_rows():
    text = to_markdown(RunFacts("r", "j"), [])
    assert text == "## ⚠️ j: nothing has run yet\n\n- 0 models, 0 tasks: none\n\nRun: `r`\n"


def test_the_worst_first():
    assert [one.model for one in worst_first(ROWS)] == ["gone", "bad", "fine", "bare"]
    assert headline(totals([row("a"), row("b")]), {}) == ("good", "all 2 tasks done")
    assert headline(totals([row("a", gate="warn")]), {}) == ("warn", "1 gate warned")


def test_figures_in_words():
    assert [size(one) for one in (0, 1023, 1024, 10 * 1024, 150 * 2**20, 2**50)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "10.0 KiB",
        "150 MiB",
        "1024 TiB",
    ]
    assert [duration(one) for one in (None, 0.04, 59.9, 60, 3599.6)] == [
        "",
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 h 0 min",
    ]
