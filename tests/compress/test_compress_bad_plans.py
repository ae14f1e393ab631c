"""Plans that do not fit a network: budgets out of reach, and layer rules that break a pair."""

from __future__ import annotations

from typing import Any

import pytest
from dfmpc.compress.compress import compress_model
from dfmpc.errors import UnsupportedModelError
from dfmpc.job.schema import LayerRule
from dfmpc.models.load import LoadedModel


@pytest.mark.parametrize(
    ("budget", "rules", "said"),
    [
        ({"bits_per_weight": 2.0}, [], r"budget of 2 bits a weight is out of reach: this model takes \d\.\d+ bits"),
        ({"bytes": 100}, [], r"100 bytes is out of reach: this model takes about [\d,]+ bytes with 2 bits"),
        ({"bytes": "1MB"}, [], r"1,000,000 bytes is above half precision.*ask for something between"),
        ({"bits_per_weight": 3.0}, [LayerRule(match="*", bits=8)], "out of reach"),
        ({"bits_per_weight": 3.0}, [LayerRule(match="*", keep=True)], "no layer is quantized, so a budget means"),
    ],
    ids=["below_two_bits", "few_bytes", "above_half", "rules_take_too_much", "nothing_left"],
)
def test_a_budget_out_of_reach_is_told_its_bounds(
    probe: Any, plain: LoadedModel, budget: dict[str, object], rules: list[LayerRule], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        compress_model(plain, probe.plan(budget=budget), rules)


@pytest.mark.parametrize("recipe", ["published", "auto"])
@pytest.mark.parametrize("broken", ["low", "high"])
def test_a_rule_that_keeps_one_of_a_pair_leaves_the_other_without_c(
    probe: Any, plain: LoadedModel, recipe: str, calibrator: str, broken: str
) -> None:
    """The pair is gone: no c is solved, the other layer keeps its role's width and statistics are re-estimated."""
    found = compress_model(plain, probe.plan(calibrator, recipe=recipe), [LayerRule(match=broken, keep=True)])
    layers = probe.by_name(found)
    other = {"low": "high", "high": "low"}[broken]
    assert found.kept == {broken: "kept by a layer rule"}
    assert set(layers) == {"stem", "low", "high", "fc"} - {broken}
    assert f"its partner {broken} is kept by a layer rule" in layers[other].reason
    assert layers[other].quantized.format.bits == {"low": 2, "high": 6}[other]
    assert (layers[other].coefficients, layers[other].folded, layers[other].input_scale) == (None, None, None)
    assert f"{broken}.weight" not in found.changed()
    assert not {"bn1.weight", "bn1.bias"} & set(found.tensors)
    behind = {"low": "bn1.running_var", "high": "bn2.running_var"}[other]
    assert (behind in found.tensors) == (calibrator not in {"none", "norm"})
    probe.unharmed(plain, found)


@pytest.mark.parametrize("recipe", ["published", "auto"])
def test_a_rule_of_bits_inside_a_pair_keeps_the_pair(probe: Any, plain: LoadedModel, recipe: str) -> None:
    rules = [LayerRule(match="low", bits=5), LayerRule(match="high", bits=2)]
    layers = probe.by_name(compress_model(plain, probe.plan(recipe=recipe), rules))
    assert (layers["low"].quantized.format.bits, layers["high"].quantized.format.bits) == (5, 2)
    assert layers["low"].partners == ("high",)
    assert (layers["low"].coefficients is not None) == (recipe == "published")
