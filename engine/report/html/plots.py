"""The plots as Vega-Lite specifications without data, which the page's script puts in, and the library that draws them.

Vega-Lite rather than Plotly: a fifth of the bytes in every page, parsed sooner by a phone, and specifications that are
data. Rather than drawings made beforehand: hundreds of tasks stay numbers, which are drawn only when they are looked
at, and follow the reader's colours and width.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ...errors import UsageError

_BITS = (2, 3, 4, 5, 6, 7, 8)
_BLUES = ("#dbe9f6", "#bad6eb", "#89bedc", "#539ecd", "#2b7bba", "#0b559f", "#08306b")
"""Light for few bits, dark for many: the order survives every kind of colour blindness, and print."""

Json = dict[str, Any]


def require_library() -> None:
    """Raise UsageError where the extra that brings the library is not installed."""
    if find_spec("vl_convert") is None:
        raise UsageError("--html needs vl-convert-python, not installed here: pip install 'dfmpc[html]'")


def library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script; UsageError where it is missing or cannot stand in HTML."""
    require_library()
    import vl_convert  # noqa: PLC0415 - 90 MB that nothing else needs

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("\r", "")
    if "</script" in script.lower() or "<!--" in script:
        raise UsageError("this vl-convert-python's script cannot stand in a page: install the version of dfmpc[html]")
    return script


def specifications() -> Json:
    """Return the specifications by name; the script gives each its data, width and colours."""
    return {
        "pareto": _pareto(),
        "bits": _bits(),
        "sqnr": _sqnr(),
        "coefficients": _coefficients(),
        "histogram": _histogram(),
    }


def _pareto() -> Json:
    x = {
        "field": "mib",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": True, "padding": 18},
        "axis": {"tickCount": 4, "grid": False, "format": ".3~g"},
    }
    y = {
        "field": "y",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "padding": 16},
        "axis": {"tickCount": 5},
    }
    tooltip = [
        {"field": "plan", "title": "bit-plan"},
        {"field": "mib", "title": "MiB", "format": ".3f"},
        {"field": "ratio", "title": "times smaller", "format": ".2f"},
        {"field": "y", "title": "value", "format": ".4~g"},
        {"field": "gate", "title": "gate"},
    ]
    kind = {"field": "method", "type": "nominal", "legend": None}
    return {
        "height": 210,
        "encoding": {"y": y},
        "layer": [
            {
                "transform": [{"filter": "datum.original"}],
                "mark": {"type": "rule", "strokeDash": [5, 4], "style": "original"},
            },
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {"type": "line", "interpolate": "step-after", "style": "front"},
                "encoding": {"x": x},
            },
            {
                "transform": [{"filter": "!datum.original"}],
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {
                    "x": x,
                    "color": kind,
                    "shape": kind,
                    "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.45},
                    "tooltip": tooltip,
                },
            },
            {
                "transform": [{"filter": "datum.named"}],
                "mark": {
                    "type": "text",
                    "fontSize": 11,
                    "dy": -11,
                    "align": {"expr": "datum.right ? 'right' : 'left'"},
                    "dx": {"expr": "datum.right ? 6 : -6"},
                },
                "encoding": {
                    "x": x,
                    "text": {"field": "plan"},
                    "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.65},
                },
            },
        ],
    }


_ROWS: Json = {
    "field": "layer",
    "type": "nominal",
    "sort": None,
    "title": None,
    "axis": {"labelLimit": 170, "ticks": False, "domain": False, "labelPadding": 6},
}
_LAYER_TOOLTIP = [
    {"field": "layer", "title": "layer"},
    {"field": "plan", "title": "bit-plan"},
    {"field": "bits", "title": "bits"},
    {"field": "role", "title": "role"},
    {"field": "sqnr", "title": "SQNR, dB", "format": ".2f"},
    {"field": "zeros", "title": "zeros", "format": ".1%"},
    {"field": "clipped", "title": "clipped", "format": ".2%"},
    {"field": "cmean", "title": "mean c", "format": ".3f"},
    {"field": "cmin", "title": "least c", "format": ".3f"},
    {"field": "cmax", "title": "largest c", "format": ".3f"},
]


def _bits() -> Json:
    x = {
        "field": "plan",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {
            "orient": "top",
            "labelAngle": -40,
            "labelAlign": "left",
            "labelLimit": 110,
            "ticks": False,
            "domain": False,
        },
    }
    colour = {
        "condition": {
            "test": "datum.bits !== null",
            "field": "bits",
            "type": "ordinal",
            "scale": {"domain": list(_BITS), "range": list(_BLUES)},
            "legend": None,
        },
        "value": "transparent",
    }
    ink = {"condition": {"test": "datum.bits >= 5", "value": "#ffffff"}, "value": "#10233c"}
    return {
        "height": {"step": 18},
        "title": {"text": "Bits", "anchor": "start"},
        "encoding": {"x": x, "y": _ROWS},
        "layer": [
            {
                "mark": {"type": "rect", "cornerRadius": 2, "height": {"band": 0.9}, "width": {"band": 0.94}},
                "encoding": {"color": colour, "tooltip": _LAYER_TOOLTIP},
            },
            {
                "transform": [{"filter": "datum.bits !== null"}],
                "mark": {"type": "text", "fontSize": 11, "tooltip": False},
                "encoding": {"text": {"field": "bits"}, "color": ink},
            },
            {
                "transform": [{"filter": "datum.bits === null"}],
                "mark": {"type": "text", "fontSize": 11, "style": "quiet"},
                "encoding": {"text": {"value": "kept"}, "tooltip": _LAYER_TOOLTIP},
            },
        ],
    }


def _sqnr() -> Json:
    """A dot a plan in each layer's row, worse to the left; a thin line joins them."""
    x = {
        "field": "sqnr",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": True, "padding": 6},
        "axis": {"orient": "top", "tickCount": 5},
    }
    dot = {"type": "point", "filled": True, "size": 46, "opacity": 0.95}
    return {
        "height": {"step": 18},
        "title": {"text": "SQNR of the weights, dB", "anchor": "start"},
        "encoding": {"y": _ROWS},
        "layer": [
            {
                "mark": {"type": "rule", "style": "span"},
                "encoding": {"x": {**x, "aggregate": "min"}, "x2": {"field": "sqnr", "aggregate": "max"}},
            },
            {"mark": dot, "encoding": {"x": x, **_by_plan(), "tooltip": _LAYER_TOOLTIP}},
        ],
    }


def _coefficients() -> Json:
    x = {
        "field": "cmin",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": True},
        "axis": {"orient": "top", "tickCount": 5},
    }
    return {
        "height": {"step": 18},
        "title": {"text": "c, from least to largest, dot at the mean", "anchor": "start"},
        "transform": [{"filter": "isValid(datum.cmean)"}],
        "encoding": {"y": _ROWS},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.45},
                "encoding": {"x": x, "x2": {"field": "cmax"}, "color": _by_plan()["color"]},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 46, "opacity": 0.95},
                "encoding": {"x": {**x, "field": "cmean"}, **_by_plan(), "tooltip": _LAYER_TOOLTIP},
            },
        ],
    }


def _by_plan() -> Json:
    """Colour and shape of a plan; the script adds both scales, which all plots of a page share."""
    return {
        "color": {"field": "plan", "type": "nominal", "legend": None},
        "shape": {"field": "plan", "type": "nominal", "legend": None},
    }


def _histogram() -> Json:
    """Shares by weight; the root keeps a bell visible beside the few levels that two bits have."""
    x = {
        "field": "from",
        "type": "quantitative",
        "title": None,
        "axis": {"grid": False, "tickCount": 5, "format": "~g"},
    }
    y = {
        "field": "share",
        "type": "quantitative",
        "title": None,
        "scale": {"type": "sqrt"},
        "axis": {"format": ".0%", "tickCount": 3},
    }
    bar = {"type": "bar", "binSpacing": 0, "orient": "vertical"}
    both = {"x": {**x, "bin": {"binned": True}}, "x2": {"field": "to"}, "y": y}
    return {
        "height": 96,
        "layer": [
            {
                "transform": [{"filter": "datum.when === 'before'"}],
                "mark": {**bar, "style": "before"},
                "encoding": both,
            },
            {
                "transform": [{"filter": "datum.when === 'after'"}],
                "mark": {**bar, "style": "after", "opacity": 0.75},
                "encoding": both,
            },
        ],
    }
