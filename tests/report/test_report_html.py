"""The page of a run in a real browser: what it shows, how it sorts, filters and fits, and that names stay names."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest
from dfmpc.errors import UsageError
from dfmpc.report.html import plots
from dfmpc.report.html.drawn import pareto_front
from dfmpc.report.html.histograms import BINS, Histogram, ModelHistograms
from dfmpc.report.html.page import embedded, to_html
from dfmpc.report.rows import LayerRow, ModelRow
from dfmpc.report.verdict import RunFacts

NOON = datetime(2025, 1, 2, 12, 0, tzinfo=UTC)
FACTS = RunFacts(run="store/runs/r1", job="nightly", store="store", wall_s=75.0)
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">\n\'"`${1+1}&amp;{{x}}'
QUIET = '<b onmouseover="window.hacked = 3">'


def model_row(model: str, plan: str, **changes: object) -> ModelRow:
    task = {
        "run": "r1",
        "task": f"{model}/{plan}",
        "model": model,
        "bit_plan": plan,
        "method": plan.rstrip("0123456789"),
    }
    done = {"status": "done", "finished_at": NOON, "bytes_before": 4 * 2**20, "bytes_after": 2**20, "ratio": 4.0}
    scores = {"top1_before": 91.5, "top1_after": 90.0, "agreement": 0.95, "gate": "pass", "compress_s": 2.0}
    return ModelRow(**(task | done | scores | changes))  # type: ignore[arg-type]


def layer_rows(row: ModelRow, names: Sequence[str]) -> list[LayerRow]:
    return [
        LayerRow(
            run=row.run,
            task=row.task,
            model=row.model,
            bit_plan=row.bit_plan,
            name=name,
            role="low",
            shape=(8, 4, 3, 3),
            bits=2 + number % 7,
            sqnr_db=5.0 + number,
            sparsity=0.25,
            clipped_fraction=0.01,
            c_min=0.5,
            c_mean=0.9,
            c_max=1.25,
        )
        for number, name in enumerate(names)
    ]


FAILED = {
    "status": "failed",
    "error_class": "CheckpointError",
    "error": "cut short",
    "failure": "data",
    "gate": None,
    **dict.fromkeys(("bytes_before", "bytes_after", "ratio", "top1_before", "top1_after", "agreement", "compress_s")),
}
ROWS = [
    model_row("alpha", "mp2", top1_after=60.0, bytes_after=2**19, ratio=8.0, gate="fail", gate_reason="fell by 31.5"),
    model_row("alpha", "rtn4"),
    model_row("alpha", "rtn8", top1_after=91.5, bytes_after=2**21, ratio=2.0),
    model_row("beta", "mp2", top1_after=80.0, gate="warn", gate_reason="warns at 5"),
    model_row("beta", "rtn4", **FAILED),
]
NAMES = [f"layer{number}.conv" for number in range(30)]
"""In the order of the network, in which the last is the worst."""
LAYERS = [layer for row in ROWS[:4] for layer in reversed(layer_rows(row, NAMES))]
COUNTED = Histogram(1.5, tuple(range(BINS)), {"mp2": (10,) * BINS, "rtn4": (1,) + (0,) * (BINS - 1)})
HISTOGRAMS = {"alpha": ModelHistograms({"layer0.conv": COUNTED}, ("weights before <i>x</i> are not shown",))}


def test_data_can_neither_end_its_element_nor_hide_what_follows():
    found = embedded({HOSTILE: ["<!--", "&", "\u2028"]})
    assert re.search("[<>&\u2028]", found) is None


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 50.0), (2.0, 90.0), (3.0, 80.0)], {0, 1}),
        ([(1.0, 90.0), (1.0, 91.0), (2.0, 91.0)], {1}),
        ([], set()),
    ],
    ids=["one beaten", "equal size or quality", "none"],
)
def test_the_front_has_what_nothing_beats(points: list[tuple[float, float]], front: set[int]):
    assert pareto_front(points) == front


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=re.escape("pip install 'dfmpc[html]'")):
        to_html(FACTS, ROWS, LAYERS, {})


def _driving() -> ModuleType:
    """Return the module that drives the browser, or skip; a page itself needs only the library that draws."""
    pytest.importorskip("vl_convert", reason="needs vl-convert-python: pip install 'dfmpc[html]'")
    pytest.importorskip("selenium", reason="needs selenium: pip install 'dfmpc[dev]'")
    file = Path(__file__).with_name("page_browser.py")
    spec = importlib.util.spec_from_file_location("page_browser", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.CHROMIUM is None or module.DRIVER is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with _driving().browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = dataclasses.replace(
        FACTS, rest={"waiting": ("gamma/mp2",)}, log_tails={"beta/rtn4": ("line 1", "  line 2")}
    )
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(to_html(facts, ROWS, LAYERS, HISTOGRAMS), encoding="utf-8")
    return file


def test_the_page_asks_for_nothing_and_complains_of_nothing_with_every_plot_drawn(browser, page: Path):
    browser.open(page)
    assert browser.draw_everything() == 2 + 2 + 1  # a trade-off and the layers of each model, one histogram
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_tiles_and_attention_say_how_it_went(browser, page: Path):
    browser.open(page)
    assert browser.texts(".verdict") == ["1 task failed, 1 gate closed, 1 gate warned, 1 task without a result"]
    tiles = dict(zip(browser.texts(".tile-title"), browser.texts(".tile-value"), strict=True))
    assert tiles == {
        "Tasks": "5",
        "Smaller": "3.56 ×",  # 16 MiB over 4.5
        "Largest top-1 loss": "31.50 pt",
        "Gates closed": "1",
        "Wall time": "1 min 15 s",
    }
    assert browser.texts(".failure h3") == ["failed beta/rtn4"]
    browser.click(".failure summary")
    assert browser.texts(".failure pre") == ["line 1\n  line 2"]
    assert browser.texts("#attention .card:nth-of-type(3) li") == ["gamma/mp2"]


def order(browser) -> list[str]:
    return [
        f"{model}/{plan}"
        for model, plan in zip(*(browser.texts(f"#tasks tbody tr > :nth-child({n})") for n in (1, 2)), strict=True)
    ]


def heads(browser) -> list[str]:
    return browser.texts("#tasks thead button")


def test_the_worst_comes_first_and_a_click_sorts_with_the_unknown_last(browser, page: Path):
    browser.open(page)
    assert order(browser) == ["beta/rtn4", "alpha/mp2", "beta/mp2", "alpha/rtn4", "alpha/rtn8"]
    column = heads(browser).index("Top-1 after")
    browser.click("#tasks thead button", column)
    assert order(browser) == ["alpha/mp2", "beta/mp2", "alpha/rtn4", "alpha/rtn8", "beta/rtn4"]
    sorts = "return [...document.querySelectorAll('#tasks thead th')].map(e => e.ariaSort)"
    assert browser.run(sorts) == ["ascending" if n == column else "none" for n in range(len(heads(browser)))]
    browser.click("#tasks thead button", column)
    assert order(browser) == ["alpha/rtn8", "alpha/rtn4", "beta/mp2", "alpha/mp2", "beta/rtn4"]
    assert browser.run(sorts)[column] == "descending"
    browser.click("#tasks thead button", 1)
    assert [task.split("/")[1] for task in order(browser)] == ["mp2", "mp2", "rtn4", "rtn4", "rtn8"]


def test_heads_sort_by_keyboard_too(browser, page: Path):
    browser.open(page)
    browser.run("document.querySelectorAll('#tasks thead button')[0].focus()")
    browser.driver.switch_to.active_element.send_keys("\ue007")  # the enter key
    assert order(browser) == ["alpha/mp2", "alpha/rtn4", "alpha/rtn8", "beta/rtn4", "beta/mp2"]


def test_words_and_buttons_filter(browser, page: Path):
    browser.open(page)
    assert browser.texts("#shown") == ["5 tasks, worst first until sorted"]
    find = browser.driver.find_element("id", "find")
    find.send_keys("RTN alp")
    assert order(browser) == ["alpha/rtn4", "alpha/rtn8"]
    assert browser.texts("#shown") == ["2 of 5 tasks"]
    find.clear()
    chips = browser.texts(".filters .chip")
    assert chips == ["done", "failed", "gate fail", "gate pass", "gate warn"]
    browser.click(".filters .chip", chips.index("failed"))
    assert order(browser) == ["beta/rtn4"]
    browser.click(".filters .chip", chips.index("failed"))
    for name in ("gate fail", "gate warn"):
        browser.click(".filters .chip", chips.index(name))
    assert order(browser) == ["alpha/mp2", "beta/mp2"]


def test_it_follows_the_readers_colours_and_the_switch(browser, page: Path):
    back = "return getComputedStyle(document.body).backgroundColor"
    ink = "return document.querySelector('.cards .plot svg text')?.getAttribute('fill')"
    dark, light = "rgb(15, 20, 27)", "rgb(246, 247, 249)"
    browser.open(page, scheme="light", height=2600)
    assert browser.run(back) == light
    assert browser.until(ink, "a plot") == "#5a6577"
    browser.media("dark")
    assert browser.run(back) == dark
    browser.until(f"{ink} === '#9dabbd'", "the plot in dark")
    browser.click("#theme")
    assert (browser.texts("#theme"), browser.run(back)) == (["Theme: light"], light)
    browser.until(f"{ink} === '#5a6577'", "the plot in light")
    browser.media("light")
    browser.click("#theme")
    assert (browser.texts("#theme"), browser.run(back)) == (["Theme: dark"], dark)
    browser.driver.refresh()
    assert (browser.texts("#theme"), browser.run(back)) == (["Theme: dark"], dark)  # kept


def test_layers_come_worst_first_or_in_order_and_all_at_a_click(browser, page: Path):
    shown = "return document.querySelectorAll('[data-model=\"1\"] .panels .mark-text.role-mark text').length"
    browser.open(page, height=3000)
    browser.draw_everything()
    assert browser.run(shown) == 24 * 3  # the first layers at three bit-plans
    assert browser.texts(".more")[1] == "Show all 30 layers"
    browser.click(".more", 1)
    browser.until(f"{shown} === {30 * 3}", "all layers")
    assert browser.texts('[data-model="1"] tbody td:first-child') == NAMES[:8]
    second = (
        "document.querySelectorAll('[data-model=\"1\"] .panels .role-axis-label')[1].querySelector('text').textContent"
    )
    assert browser.run(f"return {second}") == "layer0.conv"
    browser.click('[data-model="1"] .order[data-order=network]')
    browser.until(f"return {second} === 'layer29.conv'", "the network's order")


@pytest.fixture(scope="module")
def hostile(browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    long = "x" * 300
    rows = [
        model_row(HOSTILE, QUIET, gate="fail", gate_reason=HOSTILE, recipe=HOSTILE, artifact=HOSTILE),
        model_row(HOSTILE, "p" * 200),
        model_row(long, QUIET, **(FAILED | {"error_class": HOSTILE, "error": HOSTILE, "failure": HOSTILE})),
    ]
    layers = [layer for row in rows[:2] for layer in layer_rows(row, [HOSTILE, QUIET, long, "javascript:alert(1)"])]
    facts = RunFacts(HOSTILE, HOSTILE, HOSTILE, 1.0, {"waiting": (HOSTILE,)}, {rows[2].task: (HOSTILE, long)})
    found = {HOSTILE: ModelHistograms({HOSTILE: Histogram(1.0, (1,) * BINS, {QUIET: (2,) * BINS})}, (HOSTILE,))}
    file = tmp_path_factory.mktemp("hostile") / "report.html"
    file.write_text(to_html(facts, rows, layers, found), encoding="utf-8")
    return file


def test_hostile_names_are_shown_and_do_nothing(browser, hostile: Path):
    browser.open(hostile)
    assert browser.draw_everything() == 1 + 1 + 1
    hover = "for (const e of document.querySelectorAll('*')) for (const t of ['mouseover', 'mousemove', 'click'])"
    browser.run(hover + " if (e.tagName !== 'BUTTON') e.dispatchEvent(new MouseEvent(t, {bubbles: true}))")
    assert browser.run("return [window.hacked ?? null, document.querySelectorAll('img, b[onmouseover]').length]") == [
        None,
        0,
    ]
    assert browser.texts("h1") == [HOSTILE]
    assert HOSTILE in browser.texts("#tasks tbody th")
    assert HOSTILE in browser.texts(".cards h3")
    assert browser.run("return document.querySelector('.plan').value") == QUIET
    assert browser.requests() == [hostile.as_uri()]
    assert browser.complaints() == []


@pytest.mark.parametrize("kind", ["page", "hostile"])
def test_a_phone_scrolls_tables_and_not_the_page(browser, kind: str, request: pytest.FixtureRequest):
    browser.open(request.getfixturevalue(kind), width=390, height=844)
    browser.draw_everything()
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert (
        browser.run("return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]") == [390] * 3
    )
    assert browser.run("const e = document.querySelector('.scroll'); return e.scrollWidth > e.clientWidth")


def test_a_run_that_has_not_begun_is_a_page_too(browser, tmp_path: Path):
    file = tmp_path / "report.html"
    file.write_text(to_html(dataclasses.replace(FACTS, rest={"waiting": ("a/b",)}), [], [], {}), encoding="utf-8")
    browser.open(file)
    assert browser.texts(".verdict") == ["1 task without a result"]
    assert browser.complaints() == []


@pytest.mark.slow
def test_two_hundred_tasks_of_sixty_layers_stay_small_and_quick(browser, tmp_path: Path):
    rows = [model_row(f"model{model}", f"rtn{plan}") for model in range(50) for plan in range(4)]
    names = [f"features.{number}.block.conv" for number in range(60)]
    layers = [layer for row in rows for layer in layer_rows(row, names)]
    file = tmp_path / "report.html"
    file.write_text(to_html(FACTS, rows, layers, {}), encoding="utf-8")
    assert file.stat().st_size < 10e6
    browser.open(file)
    assert len(order(browser)) == 200
    assert browser.run("return performance.getEntriesByType('navigation')[0].domComplete") < 10_000  # milliseconds
    assert browser.draw_everything() == 50 + 50


def test_layers_called_by_numbers_keep_their_order(browser, tmp_path: Path):
    row = model_row("net", "rtn4")
    layers = layer_rows(row, ["5", "3", "10"])  # the worst first; as keys of an object they would be sorted
    found = {"net": ModelHistograms(dict.fromkeys(("5", "3", "10"), COUNTED))}
    file = tmp_path / "report.html"
    file.write_text(to_html(FACTS, [row], layers, found), encoding="utf-8")
    browser.open(file)
    browser.draw_everything()
    assert browser.texts(".histograms figcaption b") == ["5", "3", "10"]
    assert browser.texts("#shown") == ["1 task, worst first until sorted"]
