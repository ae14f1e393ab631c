"""Pairs where tensors branch, meet and repeat: residuals, concatenations, shared weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from dfmpc.models.capture import capture
from dfmpc.models.graph import Op, Pair, Pairing
from dfmpc.models.pairs import find_pairs
from torch import Tensor, nn


class Fn(nn.Module):
    """A function of the input and of named modules, as a network."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **more: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **more)


def paired(function: Callable[..., Tensor], shape: tuple[int, ...] = (2, 3, 8, 8), **modules: nn.Module) -> Pairing:
    return find_pairs(capture(Fn(function, **modules).eval(), shape))


def test_a_shared_weight_is_refused_by_name() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.norm(net.low(net.stem(x))))
        return net.head(net.twice(net.twice(x)))

    pairing = paired(
        forward, stem=conv(3, 4), low=conv(4, 6), norm=nn.BatchNorm2d(6), twice=conv(6, 6), head=conv(6, 2)
    )
    assert pairing.pairs == ()
    used = "its weight twice.weight is used 2 times: by conv2d_2 and conv2d_3"
    assert pairing.reasons["twice"] == used
    assert pairing.reasons["low"] == f"partner twice: {used}"


def test_a_shared_norm_takes_no_coefficients() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.norm(net.low(net.stem(x))))
        return net.head(F.relu(net.norm(net.middle(x))))

    norm = nn.BatchNorm2d(4)
    pairing = paired(forward, stem=conv(3, 4), low=conv(4, 4), middle=conv(4, 4), norm=norm, head=conv(4, 2))
    assert pairing.pairs == ()
    assert pairing.reasons["low"] == pairing.reasons["middle"] == "norm.weight of its BatchNorm is used 2 times"


def test_a_shared_low_weight_is_refused_by_name() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = F.relu(net.norm(net.low(x)))
        return net.head(F.relu(net.norm(net.low(x))))

    pairing = paired(forward, stem=conv(3, 4), low=conv(4, 4), norm=nn.BatchNorm2d(4), head=conv(4, 2))
    assert pairing.pairs == ()
    assert pairing.reasons["low"].startswith("its weight low.weight is used 2 times")


def test_tied_modules_count_as_one_weight() -> None:
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), conv(4, 2))
    net[5].weight = net[2].weight
    pairing = find_pairs(capture(net.eval(), (2, 3, 8, 8)))
    assert pairing.pairs == ()
    assert pairing.reasons["2"] == "its weight 2.weight is used 2 times: by conv2d_1 and conv2d_2"


def test_a_residual_add_bars_the_layer_before_it_only() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.norm0(net.stem(x)))
        y = F.relu(net.norm1(net.conv1(x)))
        return net.head(F.relu(x + net.norm2(net.conv2(y))))

    pairing = paired(
        forward, stem=conv(3, 4), norm0=nn.BatchNorm2d(4), conv1=conv(4, 4), norm1=nn.BatchNorm2d(4),
        conv2=conv(4, 4), norm2=nn.BatchNorm2d(4), head=conv(4, 2),
    )  # fmt: skip
    assert pairing.pairs == (Pair("conv1", "norm1", Op.RELU, "conv2", folds=True),)
    assert pairing.reasons == {"stem": "stem", "head": "classifier"}


def test_a_tensor_that_a_residual_add_reads_too_bars_its_layer() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.norm1(net.conv1(net.stem(x))))
        return net.head(x + net.conv2(x))

    pairing = paired(
        forward, stem=conv(3, 4), conv1=conv(4, 4), norm1=nn.BatchNorm2d(4), conv2=conv(4, 4), head=conv(4, 2)
    )
    assert pairing.pairs == ()
    assert pairing.reasons["conv1"] == "feeds a residual add"


def test_several_readers_make_several_pairs_that_do_not_fold() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.norm(net.low(net.stem(x))))
        return net.head(net.left(x) * net.right(F.max_pool2d(x, 3, 1, 1)))

    pairing = paired(
        forward, stem=conv(3, 4), low=conv(4, 4), norm=nn.BatchNorm2d(4), left=conv(4, 4), right=conv(4, 4),
        head=conv(4, 2),
    )  # fmt: skip
    because = "2 layers read it: left, right"
    assert pairing.pairs == (
        Pair("low", "norm", Op.RELU, "left", unfolded_because=because),
        Pair("low", "norm", Op.RELU, "right", unfolded_because=because),
    )


def test_different_activations_on_one_norm_bar_the_layer() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.norm(net.low(net.stem(x)))
        return net.head(net.left(F.relu(x)) * net.right(x))

    pairing = paired(
        forward, stem=conv(3, 4), low=conv(4, 4), norm=nn.BatchNorm2d(4), left=conv(4, 4), right=conv(4, 4),
        head=conv(4, 2),
    )  # fmt: skip
    assert pairing.pairs == ()
    assert pairing.reasons["low"] == "its norm is read with different activations"


def test_a_raw_output_that_something_else_reads_bars_the_layer() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.low(net.stem(x))
        return net.head(F.relu(net.norm(x)) * x)

    pairing = paired(forward, stem=conv(3, 4), low=conv(4, 4), norm=nn.BatchNorm2d(4), head=conv(4, 2))
    assert pairing.reasons["low"] == "output read by mul besides its norm"


def test_an_inverted_residual() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = F.relu6(net.norm1(net.expand(x)))
        y = F.relu6(net.norm2(net.depthwise(y)))
        y = net.norm3(net.project(y))
        return net.head(F.relu6(net.norm4(net.next(y))))

    pairing = paired(
        forward, stem=conv(3, 4), expand=conv(4, 8, 1), norm1=nn.BatchNorm2d(8), depthwise=conv(8, 8, groups=8),
        norm2=nn.BatchNorm2d(8), project=conv(8, 4, 1), norm3=nn.BatchNorm2d(4), next=conv(4, 8),
        norm4=nn.BatchNorm2d(8), head=conv(8, 2),
    )  # fmt: skip
    assert [(pair.low, pair.high, pair.folds) for pair in pairing.pairs] == [
        ("expand", "depthwise", False),
        ("next", "head", False),
    ]
    assert pairing.reasons == {"stem": "stem", "project": "its partner next is LOW already"}


def test_a_project_layer_is_never_low_even_behind_a_gate() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(net.norm2(net.depthwise(net.stem(x))))
        y = y * torch.sigmoid(net.gate(y.mean((2, 3), keepdim=True)))
        return net.head(net.after(net.norm3(net.project(y))))

    pairing = paired(
        forward, stem=conv(3, 4), depthwise=conv(4, 4, groups=4), norm2=nn.BatchNorm2d(4), gate=conv(4, 4, 1),
        project=conv(4, 4, 1), norm3=nn.BatchNorm2d(4), after=conv(4, 4, 1), head=conv(4, 2),
    )  # fmt: skip
    assert pairing.pairs == ()
    assert pairing.reasons["project"] == "linear bottleneck: no activation behind it and a depthwise layer in front"
    assert pairing.reasons["depthwise"] == "depthwise"


def test_spatial_kernels_are_chosen_before_pointwise_ones() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = F.relu(net.norm1(net.conv1(x)))
        x = F.relu(net.norm2(net.conv2(x)))
        return net.head(F.relu(net.norm3(net.conv3(x))))

    pairing = paired(
        forward, stem=conv(3, 4), conv1=conv(4, 4, 1), norm1=nn.BatchNorm2d(4), conv2=conv(4, 4),
        norm2=nn.BatchNorm2d(4), conv3=conv(4, 4, 1), norm3=nn.BatchNorm2d(4), head=conv(4, 2, 1),
    )  # fmt: skip
    assert pairing.pairs == (Pair("conv2", "norm2", Op.RELU, "conv3", folds=True),)
    assert pairing.reasons["conv1"] == "its partner conv2 is LOW already"


def test_slices_of_a_concatenation_have_offsets() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.stem(x)
        a = net.a(x)
        x = torch.cat([x, a], 1)
        b = net.b2(F.relu(net.norm_b2(net.b1(F.relu(net.norm_b1(x))))))
        x = F.avg_pool2d(torch.cat([x, b], 1), 2)
        return net.head(net.last(F.relu6(net.norm_last(x))))

    pairing = paired(
        forward, stem=conv(3, 4), a=conv(4, 5), norm_b1=nn.BatchNorm2d(9), b1=conv(9, 6, 1), norm_b2=nn.BatchNorm2d(6),
        b2=conv(6, 7), norm_last=nn.BatchNorm2d(16), last=conv(16, 4, 1), head=conv(4, 2),
    )  # fmt: skip
    clip = "relu6: the clip point would move"
    assert pairing.pairs == (
        Pair("a", "norm_b1", Op.RELU, "b1", offset=4, folds=True),
        Pair("a", "norm_last", Op.RELU6, "last", offset=4, unfolded_because=clip),
        Pair("b2", "norm_last", Op.RELU6, "last", offset=9, unfolded_because=clip),
    )


def test_a_pointwise_layer_before_a_concatenation_is_not_low() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(F.relu(net.norm(torch.cat([x, net.point(x)], 1))))

    pairing = paired(forward, stem=conv(3, 4), point=conv(4, 4, 1), norm=nn.BatchNorm2d(8), head=conv(8, 2))
    assert pairing.reasons["point"] == "pointwise, and its norms are behind a concatenation or a pool"


def test_a_concatenation_behind_the_norm_bars_the_layer() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(torch.cat([x, F.relu(net.norm(net.low(x)))], 1))

    pairing = paired(forward, stem=conv(3, 4), low=conv(4, 4), norm=nn.BatchNorm2d(4), head=conv(8, 2))
    assert pairing.reasons["low"] == "feeds a concatenation behind its norm"
