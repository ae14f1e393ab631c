"""One self-contained page of a run: every style, script and number is in it, and its policy lets nothing be fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from ..rows import LayerRow, ModelRow
from ..verdict import RunFacts, totals, worst_first
from .drawn import model_data, worst_layers
from .histograms import ModelHistograms
from .pieces import attention, filters, task_table, text, tiles, verdict, worst_table
from .plots import library, specifications
from .provenance import provenance

LISTED = 8
"""Layers in a model's list of the worst."""


def to_html(
    facts: RunFacts,
    rows: Sequence[ModelRow],
    layers: Sequence[LayerRow],
    histograms: Mapping[str, ModelHistograms],
) -> str:
    """Return the page; ``rows`` and ``layers`` are in the job's order, ``histograms`` by model.

    Raises UsageError where the library that draws is not installed.
    """
    scripts = [library(), _own("page.js"), _own("plots.js")]
    models = _models(rows)
    by_model: dict[str, list[LayerRow]] = {name: [] for name in models}
    for row in layers:
        by_model.setdefault(row.model, []).append(row)
    found = totals(rows)
    data = [_data(models[name], by_model[name], histograms.get(name)) for name in models]
    sections = [_section(number, by_model[name], histograms.get(name)) for number, name in enumerate(models)]
    body = {
        "title": text(facts.job),
        "run": text(facts.run.rsplit("/", 1)[-1]),
        "verdict": verdict(found, facts),
        "tiles": tiles(found, facts),
        "attention": attention(rows, facts),
        "filters": filters(rows),
        "tasks": task_table(rows),
        "layers": _layers_part(list(models), sections) if layers else "",
        "provenance": provenance(rows, facts),
    }
    return Template(_own("page.html")).substitute(
        body,
        policy=_policy(scripts),
        css=_own("page.css"),
        data=embedded({"models": data, "specs": specifications()}),
        scripts="".join(f"<script>{script}</script>\n" for script in scripts),
    )


def embedded(value: Any) -> str:
    """Return ``value`` as JSON that may stand in a script element: it can neither end it nor open a comment in it."""
    found = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _own(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: these scripts run, no other does, and nothing is fetched from anywhere."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    parts = f"script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
    return f"default-src 'none'; {parts}; base-uri 'none'; form-action 'none'"


def _models(rows: Sequence[ModelRow]) -> dict[str, list[ModelRow]]:
    """Return the rows by model, the model with the worst task first, its rows in the job's order."""
    found: dict[str, list[ModelRow]] = {row.model: [] for row in worst_first(rows)}
    for row in rows:
        found[row.model].append(row)
    return found


def _data(rows: Sequence[ModelRow], layers: Sequence[LayerRow], found: ModelHistograms | None) -> dict[str, Any]:
    worst = [row.name for row in worst_layers(layers)]
    return model_data(rows, layers, found or ModelHistograms(), worst)


def _layers_part(models: Sequence[str], sections: Sequence[str]) -> str:
    lines = "".join(
        f'<details class="model" data-model="{number}"><summary>{text(name)}</summary>{section}</details>'
        for number, (name, section) in enumerate(zip(models, sections, strict=True))
        if section
    )
    return f'<section id="layers"><h2>Layers</h2>{lines}</section>' if lines else ""


def _section(number: int, layers: Sequence[LayerRow], found: ModelHistograms | None) -> str:
    """Return what a model shows when it is opened; the script draws into the empty elements."""
    if not layers:
        return ""
    worst = worst_layers(layers)
    notes = "".join(f'<p class="quiet">{text(note)}</p>' for note in (found.notes if found else ()))
    bars = (
        '<h3>Weights before and after</h3><div class="legend"><span class="swatch before"></span>before'
        '<span class="swatch after"></span>after <label>Bit-plan <select class="plan"></select></label></div>'
        f'{notes}<div class="histograms"></div>'
        if found and found.layers
        else notes
    )
    return (
        '<div class="toolbar"><div class="legend plans"></div>'
        '<div class="chips" role="group" aria-label="Order of the layers">'
        '<button type="button" class="chip order" aria-pressed="true" data-order="worst">Worst first</button>'
        '<button type="button" class="chip order" aria-pressed="false" data-order="network">In order</button>'
        "</div></div>"
        f'<div class="plot panels" role="img" aria-label="Bits, SQNR and c of the layers of model {number + 1}"></div>'
        '<button type="button" class="more" hidden></button>'
        f"<h3>Worst layers</h3>{worst_table(worst[:LISTED])}{bars}"
    )
