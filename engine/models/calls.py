"""An ATen call with named arguments, and what is known while a program is read from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .graph import Layer, Node, Op
from .shapes import fixed, tensor_shape

EVAL_REMEDY = "call .eval() before torch.export.export"


@dataclass
class Tracker:
    """What is known while a program is read from top to bottom."""

    state: dict[str, str] = field(default_factory=dict)
    """Placeholder to the name in the state dict."""
    state_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    current: dict[str, str] = field(default_factory=dict)
    """fx node to the graph node that holds its value now (an in-place operator moves it)."""
    layers: dict[str, Layer] = field(default_factory=dict)
    """Weight to its layer, so that a weight used twice gives the same one."""


@dataclass(frozen=True)
class Call:
    """One operator call with its arguments by their schema's names."""

    node: fx.Node
    args: dict[str, Any]
    tracker: Tracker

    def state_name(self, argument: str) -> str | None:
        """Name in the state dict of a tensor argument, or None where it is absent or computed."""
        value = self.args.get(argument)
        return self.tracker.state.get(value.name) if isinstance(value, fx.Node) else None

    def absent_or_state(self, *arguments: str) -> bool:
        """Whether each of these tensor arguments is None or a plain tensor of the state dict."""
        return all(self.args.get(name) is None or self.state_name(name) is not None for name in arguments)

    def input_shape(self, argument: str = "input") -> tuple[int, ...]:
        """Shape of a tensor argument."""
        value = self.args.get(argument, self.args.get("self"))
        return tensor_shape(value) if isinstance(value, fx.Node) else ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tensor_shape(self.node)

    def make(self, op: Op, **more: Any) -> Node:
        """Return a node of ``op`` that reads every activation among the arguments."""
        current = self.tracker.current
        inputs = tuple(current[n.name] for n in self.node.all_input_nodes if n.name in current)
        return Node(self.node.name, op, inputs, self.shape, target=str(self.node.target), **more)


def operator_name(node: fx.Node) -> str:
    """``aten.conv2d.default`` is ``conv2d``: the overload does not matter, the arguments have names."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "aten" else str(node.target)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    named = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    named.update(zip(named, node.args, strict=False))
    named.update(node.kwargs)
    return named


def sizes(value: Any, rank: int) -> tuple[int, ...]:
    """One size an axis; a single one stands for all."""
    given = [value] if not isinstance(value, (list, tuple)) else list(value)
    return tuple(fixed(size) for size in (given * rank if len(given) == 1 else given))
