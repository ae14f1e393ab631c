"""What a plan's recipe stands for: every step that is left open, every step that is given, and its tier."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from dfmpc.compress import rounding
from dfmpc.compress.assign import Assignment
from dfmpc.compress.calibrate import InputMoments
from dfmpc.compress.compress import compress_model
from dfmpc.compress.result import Compressed
from dfmpc.compress.rounding import RoundedLayer, round_layer
from dfmpc.job.methods import DfmpcPlan, RtnPlan
from dfmpc.job.neighbours import OmsePlan
from dfmpc.job.recipes import Steps, describe_plan, steps_of
from dfmpc.kernels.formats import Grid
from dfmpc.models.graph import Layer, Op
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
CALIBRATORS: list[object] = [
    None,
    "none",
    "norm",
    "analytic",
    {"name": "analytic", "moments": "channel"},
    {"name": "analytic", "moments": "spectral"},
    "synthetic",
]
GIVEN: list[dict[str, object]] = [
    {"ternary": "twn"},
    {"ternary": "exact"},
    {"clip": "absmax"},
    {"clip": "mse"},
    {"rounding": "nearest"},
    {"rounding": "feedback"},
    {"compensate": "none"},
    {"compensate": "c"},
    {"compensate": "least-squares"},
    {"ternary": "twn", "clip": "mse", "rounding": "nearest", "compensate": "least-squares"},
]


def plan(recipe: str = "auto", calibrator: object = None, **fields: object) -> DfmpcPlan:
    named = {} if calibrator is None else {"calibrator": calibrator}
    return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "recipe": recipe, **named, **fields})


def seen(steps: Steps) -> tuple[str, ...]:
    moments = getattr(steps.calibrator, "moments", None)
    calibrator = f"{steps.calibrator.name} {moments}" if moments else steps.calibrator.name
    return calibrator, steps.ternary, steps.clip, steps.rounding, steps.compensate


@pytest.mark.parametrize(
    ("recipe", "calibrator", "expected", "tier"),
    [
        ("published", None, ("analytic channel", "twn", "absmax", "nearest", "c"), "closed-form"),
        ("published", "none", ("none", "twn", "absmax", "nearest", "c"), "none"),
        ("published", "norm", ("norm", "twn", "absmax", "nearest", "c"), "closed-form"),
        ("published", "analytic", ("analytic channel", "twn", "absmax", "nearest", "c"), "closed-form"),
        ("published", "synthetic", ("synthetic", "twn", "absmax", "nearest", "c"), "synthetic"),
        ("auto", None, ("synthetic", "exact", "mse", "feedback", "least-squares"), "synthetic"),
        ("auto", "synthetic", ("synthetic", "exact", "mse", "feedback", "least-squares"), "synthetic"),
        ("auto", "analytic", ("analytic spectral", "exact", "mse", "feedback", "none"), "closed-form"),
        ("auto", CALIBRATORS[4], ("analytic channel", "exact", "mse", "nearest", "none"), "closed-form"),
        ("auto", "norm", ("norm", "exact", "mse", "nearest", "none"), "closed-form"),
        ("auto", "none", ("none", "exact", "mse", "nearest", "none"), "none"),
    ],
    ids=lambda value: str(value.get("moments")) if isinstance(value, dict) else None,
)
def test_a_recipe_and_a_calibrator_stand_for_their_steps(
    recipe: str, calibrator: object, expected: tuple[str, ...], tier: str
) -> None:
    steps = steps_of(plan(recipe, calibrator))
    assert seen(steps) == expected
    described = describe_plan(plan(recipe, calibrator))
    assert (described.method, described.tier, described.calibrator) == ("dfmpc", tier, expected[0].split()[0])
    assert described.recipe == f"{recipe}: {expected[1]} ternary, {expected[2]} clip, {expected[3]}, {expected[4]}"
    assert steps.correct_biases == (recipe == "auto")


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(map(str, given.values())))
def test_a_given_step_wins_and_the_others_stay(given: dict[str, object]) -> None:
    for recipe, calibrator in product(["published", "auto"], CALIBRATORS):
        default, steps = steps_of(plan(recipe, calibrator)), steps_of(plan(recipe, calibrator, **given))
        for step in ("ternary", "clip", "rounding", "compensate"):
            assert getattr(steps, step) == given.get(step, getattr(default, step))
        assert (steps.calibrator, steps.tier, steps.correct_biases) == (
            default.calibrator,
            default.tier,
            default.correct_biases,
        )


@pytest.mark.parametrize(("written", "step"), [(True, "c"), (False, "none")])
def test_compensate_may_be_yes_or_no(written: bool, step: str) -> None:
    assert steps_of(plan(compensate=written)).compensate == step


@pytest.mark.parametrize("recipe", ["published", "auto"])
@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
def test_a_recipe_factorises_where_it_wants_moments_spectra_or_images(recipe: str, calibrator: object) -> None:
    for given in ({}, *GIVEN):
        steps = steps_of(plan(recipe, calibrator, **given))
        wants = steps.rounding == "feedback" or steps.compensate == "least-squares"
        assert steps.needs_moments == wants
        assert steps.factorises == (wants or seen(steps)[0] in {"synthetic", "analytic spectral"})


def test_other_methods_are_of_the_tier_that_they_need() -> None:
    assert describe_plan(RtnPlan(name="r", method="rtn", bits=4)).tier == "none"
    neighbour = OmsePlan.model_validate({"name": "o", "method": "omse", "bits": 4})
    assert describe_plan(neighbour).method == "omse"
    assert describe_plan(neighbour).tier in {"none", "closed-form"}


LAYER = Layer("c", "c.weight", None, Op.CONV, (6, 4, 3, 3))


def rounded(role: str, steps: Steps, moments: InputMoments | None, layer: Layer = LAYER) -> RoundedLayer:
    weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))
    grid, bits = (Grid.TERNARY, 2) if role == "low" else (Grid.DOREFA, 4)
    assignment = Assignment(layer, "low" if role == "low" else "high", bits, grid, "channel")
    return round_layer(weight, assignment, steps, lambda: moments, "cpu")


def known(length: int = 36, groups: int = 1) -> InputMoments:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(groups, 400, length, generator=generator) @ torch.randn(groups, length, length, generator=generator)
    second = h.transpose(1, 2) @ h / 400
    return InputMoments(second, torch.randn(groups, 6 // groups, length, generator=generator))


@pytest.mark.parametrize("role", ["low", "high"])
def test_the_note_says_that_moments_were_missing(role: str) -> None:
    steps = steps_of(plan())
    fallen, plain = rounded(role, steps, None), rounded(role, steps_of(plan(calibrator="none")), None)
    assert fallen.note.startswith("no second moments of its input")
    assert fallen.note.endswith("rounded to nearest")
    assert plain.note == ""
    assert torch.equal(fallen.quantized.codes, plain.quantized.codes)
    assert torch.equal(fallen.quantized.scale, plain.quantized.scale)


def test_rows_too_long_for_feedback_are_rounded_to_nearest_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "MAX_FEEDBACK", 35)
    found = rounded("low", steps_of(plan()), known())
    assert "rows longer than 35" in found.note
    assert torch.equal(found.quantized.codes, rounded("low", steps_of(plan(calibrator="none")), None).quantized.codes)


@pytest.mark.parametrize("role", ["low", "high"])
def test_the_note_says_that_least_squares_failed(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "resolve", lambda *_: None)
    found = rounded(role, steps_of(plan()), known())
    assert found.note == "least squares failed"
    without = rounded(role, steps_of(plan(compensate="none")), known())
    assert torch.equal(found.quantized.codes, without.quantized.codes)


def test_the_note_says_that_least_squares_had_no_target() -> None:
    unknown = InputMoments(known().second)
    found = rounded("high", steps_of(plan(calibrator="analytic", compensate="least-squares")), unknown)
    assert found.note == "no least squares: the output that is wanted is not known, or at one position an image"
    without = rounded("high", steps_of(plan(calibrator="analytic")), unknown)
    assert torch.equal(found.quantized.codes, without.quantized.codes)


@pytest.mark.parametrize("role", ["low", "high"])
def test_the_note_says_why_feedback_fell_back(role: str) -> None:
    indefinite = InputMoments(torch.full((1, 36, 36), float("nan")), known().cross)
    found = rounded(role, steps_of(plan(compensate="none")), indefinite)
    plain = rounded(role, steps_of(plan(calibrator="none")), None)
    assert found.note
    assert torch.equal(found.quantized.codes, plain.quantized.codes)


def test_steps_that_do_not_need_moments_never_ask_for_them() -> None:
    def refuse() -> InputMoments | None:
        raise AssertionError("asked for moments")

    assignment = Assignment(LAYER, "low", 2, Grid.TERNARY, "channel")
    for recipe, calibrator in (("published", None), ("published", "synthetic"), ("auto", "none")):
        steps = steps_of(plan(recipe, calibrator))
        assert round_layer(torch.ones(LAYER.shape), assignment, steps, refuse, "cpu").note == ""


class Odd(nn.Module):
    """A transposed convolution, of whose input nobody gives moments, between a pair and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.low, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.high, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.bn3 = nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.low(torch.relu(self.bn0(self.stem(x))))))
        return self.fc(torch.relu(self.bn3(self.up(torch.relu(self.bn2(self.high(x)))))).mean((2, 3)))


@pytest.mark.parametrize("calibrator", ["analytic", {"name": "synthetic", "images": 8}], ids=["spectral", "synthetic"])
def test_the_result_says_which_layers_fell_back(loaded: Loader, calibrator: object) -> None:
    found: Compressed = compress_model(loaded(Odd(), (1, 3, 8, 8)), plan(calibrator=calibrator))
    reasons = {item.layer.name: item.reason for item in found.layers}
    assert "no second moments of its input" in reasons["up"]
    assert not any("second moments" in reasons[name] for name in ("stem", "low", "high", "fc"))


def test_norm_gives_no_moments_and_every_layer_says_so_where_feedback_was_asked_for(loaded: Loader) -> None:
    found = compress_model(loaded(Odd(), (1, 3, 8, 8)), plan(calibrator="norm", rounding="feedback"))
    assert all("no second moments of its input" in item.reason for item in found.layers)


def test_twn_levels_are_twns_where_nothing_corrects_them() -> None:
    """With uncorrelated inputs feedback has nothing to add: the first sweep is TWN's rule on a re-fitted scale."""
    identity = InputMoments(torch.eye(36)[None])
    near = rounded("low", steps_of(plan("published", "analytic")), None)
    fed = rounded("low", steps_of(plan("auto", "analytic", ternary="twn")), identity)
    exact = rounded("low", steps_of(plan("auto", "analytic")), identity)
    assert not torch.equal(near.quantized.codes, exact.quantized.codes)
    assert torch.allclose(fed.quantized.scale, near.quantized.scale, rtol=0.2)
    error = [2 * q.dot - q.quantized_norm for q in (near.quantized, fed.quantized)]
    assert bool((error[1] >= error[0] - 1e-6).all())
