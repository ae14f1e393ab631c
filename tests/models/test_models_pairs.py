from __future__ import annotations

import pytest
import torch
from dfmpc.models import pairs
from dfmpc.models.capture import capture, capture_program
from dfmpc.models.graph import Op, Pair, Pairing
from dfmpc.models.pairs import find_pairs
from torch import nn


def conv(inputs: int, outputs: int, kernel: int = 3, **more: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **more)


def plain(activation: nn.Module, *between: nn.Module, high: nn.Module | None = None) -> Pairing:
    """Pair stem, LOW, norm, activation, HIGH, classifier."""
    return find_pairs(
        capture(
            nn.Sequential(
                conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(),
                conv(4, 6), nn.BatchNorm2d(6), activation, *between,
                high or conv(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
            ).eval(),
            (2, 3, 16, 16),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "op", "because"),
    [
        (nn.ReLU(), Op.RELU, ""),
        (nn.ReLU(inplace=True), Op.RELU, ""),
        (nn.LeakyReLU(0.1), Op.LEAKY_RELU, ""),
        (nn.Identity(), Op.IDENTITY, ""),
        (nn.ReLU6(), Op.RELU6, "relu6: the clip point would move"),
        (nn.Hardtanh(0.0, 6.0, inplace=True), Op.RELU6, "relu6: the clip point would move"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_activations(activation: nn.Module, op: Op, because: str) -> None:
    pairing = plain(activation)
    assert pairing.pairs == (Pair("3", "4", op, "6", folds=not because, unfolded_because=because),)
    assert pairing.reasons == {"0": "stem", "9": "classifier"}


@pytest.mark.parametrize(
    "between",
    [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0.5), nn.ZeroPad2d((1, 2, 1, 2)), nn.ReflectionPad2d(1), nn.ReLU()],
    ids=lambda module: type(module).__name__,
)
def test_what_a_pair_looks_through(between: nn.Module) -> None:
    assert plain(nn.ReLU(), between).pairs == (Pair("3", "4", Op.RELU, "7", folds=True),)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.Softsign(), "output read by abs_1 (aten.abs.default)"),
        (nn.LayerNorm([6, 16, 16]), "output read by layer_norm (aten.layer_norm.default)"),
        (nn.ZeroPad3d((0, 0, 0, 0, 0, 0)), None),
    ],
    ids=["softsign", "layer_norm", "no-op pad"],
)
def test_what_a_pair_does_not_look_through(between: nn.Module, reason: str | None) -> None:
    assert plain(nn.Identity(), between).reasons.get("3") == reason


@pytest.mark.parametrize(
    ("activation", "op"),
    [(nn.GELU(), Op.GELU), (nn.SiLU(), Op.SILU), (nn.Hardswish(), Op.HARDSWISH), (nn.Tanh(), Op.TANH)],
    ids=lambda value: value.value if isinstance(value, Op) else "",
)
def test_a_smooth_activation_makes_a_pair_whose_c_stays_beside_it(activation: nn.Module, op: Op) -> None:
    assert plain(activation).pairs == (
        Pair("3", "4", op, "6", unfolded_because=f"{op.value}: a factor would change it"),
    )


@pytest.mark.parametrize(
    ("high", "name"),
    [
        (conv(6, 6, groups=2), "grouped"),
        (conv(6, 6, groups=6), "depthwise"),
        (nn.ConvTranspose2d(6, 6, 3), "transposed"),
        (conv(6, 6, 1), "pointwise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_of_high_layers(high: nn.Module, name: str) -> None:
    assert plain(nn.ReLU(), high=high).pairs == (Pair("3", "4", Op.RELU, "6", folds=True),)


@pytest.mark.parametrize("low", [conv(4, 6, groups=2), nn.ConvTranspose2d(4, 6, 3)], ids=["grouped", "transposed"])
def test_kinds_of_low_layers(low: nn.Module) -> None:
    net = nn.Sequential(conv(3, 4), nn.ReLU(), low, nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6), nn.ReLU(), conv(6, 2))
    pairing = find_pairs(capture(net.eval(), (2, 3, 8, 8)))
    assert pairing.pairs == (Pair("2", "3", Op.RELU, "5", folds=True),)


def test_conv1d() -> None:
    net = nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(),
        nn.MaxPool1d(2), nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 5),
    )  # fmt: skip
    pairing = find_pairs(capture(net.eval(), (2, 3, 18)))
    assert pairing.pairs == (Pair("3", "4", Op.RELU, "7", folds=True),)


def test_an_mlp_with_batch_norm() -> None:
    net = nn.Sequential(
        nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 9), nn.BatchNorm1d(9), nn.ReLU(),
        nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    pairing = find_pairs(capture(net.eval(), (2, 7)))
    assert pairing.pairs == (Pair("3", "4", Op.RELU, "6", folds=True),)
    assert pairing.reasons == {"0": "stem", "9": "classifier"}


def test_a_linear_layer_over_another_axis_makes_no_pair() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
    pairing = find_pairs(capture(net.eval(), (2, 6, 6)))
    assert pairing.pairs == ()
    assert pairing.reasons["2"] == "BatchNorm 3 is over another axis than its channels"


def test_a_linear_high_layer_behind_a_map_sees_each_channel_repeated() -> None:
    net = nn.Sequential(
        conv(3, 4), nn.ReLU(), conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(),
        nn.Linear(6 * 16, 9), nn.ReLU(), nn.Linear(9, 5),
    )  # fmt: skip
    pairing = find_pairs(capture(net.eval(), (2, 3, 8, 8)))
    assert pairing.pairs == (Pair("2", "3", Op.RELU, "8", repeat=16, folds=True),)


def test_a_head_read_by_the_classifier_alone_is_low_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        conv(3, 4), nn.ReLU(), conv(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip
    graph = capture(net.eval(), (2, 3, 8, 8))
    (pair,) = find_pairs(graph).pairs
    assert (pair.low, pair.high, pair.repeat, pair.folds) == ("2", "7", 1, False)
    monkeypatch.setattr(pairs, "CLASSIFIER_REPAIRS", False)
    off = find_pairs(graph)
    assert off.pairs == ()
    assert off.reasons["2"] == "read by the classifier only"


def test_channel_padding_bars_the_layer() -> None:
    pairing = plain(nn.ReLU(), nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), high=conv(8, 6))
    assert pairing.pairs == ()
    assert pairing.reasons["3"] == "output read by pad (aten.pad.default)"


def test_a_decomposed_program_has_the_same_pairs() -> None:
    net = nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU6(), conv(4, 6), nn.BatchNorm2d(6), nn.LeakyReLU(), conv(6, 6),
        nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    program = torch.export.export(net, (torch.zeros(2, 3, 8, 8),), strict=False)
    pairing = find_pairs(capture_program(program))
    assert [pair.low for pair in pairing.pairs] == ["3"]
    assert find_pairs(capture_program(program.run_decompositions())) == pairing
