"""Shapes of captured values: fixed numbers, with 1 for a dynamic batch."""

from __future__ import annotations

from math import prod

from torch import SymInt, Tensor, fx

from .graph import Op


def fixed(size: int | SymInt) -> int:
    """Return ``size`` as a number; a symbolic one is evaluated with every symbol at 1."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def tensor_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value, of the first tensor where it is a tuple, or () where there is none."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((item for item in value if isinstance(item, Tensor)), None)
    return tuple(fixed(size) for size in value.shape) if isinstance(value, Tensor) else ()


def reshape_op(before: tuple[int, ...], after: tuple[int, ...]) -> Op:
    """Say what a reshape from ``before`` to ``after`` is: IDENTITY, FLATTEN or OTHER.

    IDENTITY keeps batch and channels and only regroups space; FLATTEN is [N, C, ...] to [N, C * space].
    """
    if before == after:
        return Op.IDENTITY
    if len(before) < 2 or len(after) < 2 or before[0] != after[0] or prod(before) != prod(after):
        return Op.OTHER
    if len(after) == 2:
        return Op.FLATTEN
    return Op.IDENTITY if before[1] == after[1] else Op.OTHER
