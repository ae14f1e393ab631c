"""The numbers of one model that the page's script draws."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..rows import LayerRow, ModelRow
from .histograms import ModelHistograms

_MIB = 2**20
_SIGNIFICANT = 5

Json = dict[str, Any]


def model_data(
    rows: Sequence[ModelRow], layers: Sequence[LayerRow], found: ModelHistograms, worst: Sequence[str]
) -> Json:
    """Return one model's numbers for the script; ``rows`` and ``layers`` are all of that model, plans in order."""
    plans = list(dict.fromkeys(row.bit_plan for row in rows))
    names = list(dict.fromkeys(row.name for row in layers))
    return {
        "name": rows[0].model,
        "plans": plans,
        "points": _points(rows),
        "layers": names,
        "cells": {plan: _cells([row for row in layers if row.bit_plan == plan], names) for plan in plans},
        "worst": list(worst),
        "histograms": {
            name: {"edge": _figure(item.edge), "before": item.before, "after": dict(item.after)}
            for name, item in found.layers.items()
        },
    }


def _points(rows: Sequence[ModelRow]) -> Json:
    """Return size and quality of every plan, and whether no other one is at once smaller and better."""
    labelled = any(row.top1_after is not None for row in rows)
    measured = [
        (row, row.bytes_after / _MIB, value)
        for row in rows
        if row.bytes_after and (value := row.top1_after if labelled else row.agreement) is not None
    ]
    front = pareto_front([(mib, value) for _, mib, value in measured])
    named = _with_room([(mib, value) for _, mib, value in measured], front)
    middle = (min(sizes) + max(sizes)) / 2 if (sizes := [mib for _, mib, _ in measured]) else 0.0
    values = [
        {
            "plan": row.bit_plan,
            "method": row.method,
            "mib": _figure(mib),
            "y": _figure(value),
            "ratio": _figure(row.ratio),
            "gate": row.gate or "none",
            "front": number in front,
            "named": number in named,
            "right": mib > middle,
        }
        for number, (row, mib, value) in enumerate(measured)
    ]
    before = next((row.top1_before for row in rows if row.top1_before is not None), None) if labelled else 1.0
    title = "top-1 %" if labelled else "agreement"
    return {"title": title, "values": values, "before": _figure(before)}


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the numbers of the (size, quality) points that no other one beats in one and equals in the other."""
    front: set[int] = set()
    best = -math.inf
    for number in sorted(range(len(points)), key=lambda number: (points[number][0], -points[number][1])):
        if points[number][1] > best:
            best = points[number][1]
            front.add(number)
    return front


def _with_room(points: Sequence[tuple[float, float]], front: Collection[int]) -> set[int]:
    """Return which points have room for a name beside those named before them; the front's come first."""
    spans = [max(axis) - min(axis) or 1.0 for axis in zip(*points, strict=True)]
    named: list[int] = []
    for number in sorted(range(len(points)), key=lambda number: (number not in front, number)):
        gaps = [
            [abs(a - b) / span for a, b, span in zip(points[number], points[other], spans, strict=True)]
            for other in named
        ]
        if all(across > 0.3 or up > 0.12 for across, up in gaps):
            named.append(number)
    return set(named)


def _cells(rows: Sequence[LayerRow], names: Sequence[str]) -> Json:
    """Return columns of one task over ``names``: a page of two hundred tasks must stay small."""
    by_name = {row.name: row for row in rows}
    columns: Mapping[str, str] = {
        "bits": "bits",
        "sqnr": "sqnr_db",
        "zeros": "sparsity",
        "clipped": "clipped_fraction",
        "cmin": "c_min",
        "cmean": "c_mean",
        "cmax": "c_max",
        "role": "role",
    }
    found = {
        short: [_figure(getattr(by_name[name], column)) if name in by_name else None for name in names]
        for short, column in columns.items()
    }
    return {short: values for short, values in found.items() if any(value is not None for value in values)}


def _figure(value: Any) -> Any:
    """Return floats with five digits, None where they are infinite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{_SIGNIFICANT}g}") if math.isfinite(value) else None


def worst_layers(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """Return a row a layer, that of its least SQNR, the worst first; layers without error are left out."""
    worst: dict[str, LayerRow] = {}
    for row in layers:
        if row.sqnr_db is not None and (row.name not in worst or row.sqnr_db < (worst[row.name].sqnr_db or 0.0)):
            worst[row.name] = row
    return sorted(worst.values(), key=lambda row: row.sqnr_db or 0.0)
