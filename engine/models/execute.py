"""A captured program run node by node on real tensors: what forward passes over synthetic images are made of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import UnsupportedModelError
from .calls import named_arguments
from .capture import canonical_names
from .graph import Graph, Node, Op

_WHOLE = frozenset(Op) - {Op.OTHER, Op.FLATTEN, Op.IDENTITY}
"""Operations that treat every image by itself, whatever the batch that the program was exported with."""
_SAFE_IDENTITIES = ("dropout", "clone", "contiguous", "detach", "alias", "pad", "slice")


class Executor:
    """One network as its program, with tensors that the caller may replace; holds no activations.

    ``run`` computes one node from the values of its inputs. The batch may be any: an operation that may have the
    exported batch written into it runs on portions of that size. A program whose batch is dynamic runs as it stands.
    """

    def __init__(
        self, program: ExportedProgram, state: Mapping[str, Tensor], graph: Graph, device: str = "cpu"
    ) -> None:
        """Take ``state`` by the names of the program's state dict (of tied tensors the first name counts)."""
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.device = device
        self.batch = next(node.shape[0] for node in graph.nodes if node.op is Op.INPUT)
        self._activations = {node.name for node in graph.nodes}
        self._symbol, self._images = _batch_symbol(program), self.batch
        self._names, self._constants = _placeholders(program)
        self.state = {name: state[name].detach().to(device) for name in set(self._names.values()) if name in state}
        self.state |= {name: value.float() for name, value in self.state.items() if value.is_floating_point()}

    def replace(self, name: str, tensor: Tensor) -> None:
        """Let ``tensor`` stand for the state's ``name`` from now on."""
        self.state[name] = tensor.to(self.device).float()

    def arguments(self, node: Node) -> dict[str, Any]:
        """Return the operator's arguments by their names, defaults filled in."""
        return named_arguments(self.nodes[node.name])

    def sources(self, node: Node) -> list[str]:
        """Return the names under which ``run`` looks up the activations that ``node`` reads."""
        names = [self._origin(argument).name for argument in self.nodes[node.name].all_input_nodes]
        return [name for name in dict.fromkeys(names) if name in self._activations]

    def source(self, node: Node) -> str:
        """Return the first of ``sources``: what a layer or norm reads."""
        return self.sources(node)[0]

    def run(self, node: Node, values: Mapping[str, Tensor]) -> Any:
        """Return what ``node`` gives; ``values`` has the activations it reads by the names of its fx arguments.

        That is a tensor, or a tuple where the graph has nodes of their own for its parts (chunk, split).
        Raises UnsupportedModelError where the operation cannot run on another batch than the exported one.
        """
        fx_node = self.nodes[node.name]
        if fx_node.target is operator.getitem:
            return self._part(fx_node, values)
        if self._symbol:
            self._images = self._count(fx_node, values)
            return self._call(fx_node, values)
        if node.op in _WHOLE or self._as_exported(fx_node, values) or _keeps_batch(fx_node):
            return self._call(fx_node, values)
        batch = self._batch_of(fx_node, values)
        if (reshaped := self._reshape(fx_node, values, batch)) is not None:
            return reshaped
        return self._in_portions(node, fx_node, values, batch)

    def _call(self, fx_node: fx.Node, values: Mapping[str, Any]) -> Any:
        def look_up(argument: fx.Node) -> Any:
            origin = self._origin(argument).name
            return values[origin] if origin in values else self._derived(argument)

        arguments = _map_devices(fx.map_arg(fx_node.args, look_up), self.device)
        keywords = _map_devices(fx.map_arg(fx_node.kwargs, look_up), self.device)
        result = _target(fx_node)(*arguments, **keywords)
        if not isinstance(result, (tuple, list)):
            return result
        return tuple(result) if self._has_parts(fx_node) else result[0]

    def _has_parts(self, node: fx.Node) -> bool:
        """Whether the graph has a node for every part of a tuple that is read, not one for the whole."""
        parts = [user for user in node.users if user.target is operator.getitem]
        return bool(parts) and all(part.name in self._activations or not part.users for part in parts)

    def _part(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        source, index = node.args
        assert isinstance(source, fx.Node)
        whole = values[source.name]
        found = whole[index] if isinstance(whole, tuple) and isinstance(index, int) else None
        if found is None:
            raise UnsupportedModelError(
                f"{node.name}: result {index} of {source.name} ({source.target}) is not known image by image, so no "
                "forward pass over synthetic images can be made; use calibrator: analytic"
            )
        return found

    def _derived(self, node: fx.Node) -> Any:
        """Return a value that comes from parameters and constants alone, computed when it is asked for."""
        if node.op == "placeholder":
            name = self._names.get(node.name)
            return self._constants[node.name].to(self.device) if name is None else self.state[name]
        size = node.meta.get("val")
        return self._size(size) if isinstance(size, torch.SymInt) else self._call(node, {})

    def _size(self, size: torch.SymInt) -> int:
        """Return a size of a dynamic program for the batch that it runs on: only the batch is free in it."""
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, self._images)))

    def _as_exported(self, fx_node: fx.Node, values: Mapping[str, Any]) -> bool:
        """Whether the activations that an operation reads have the sizes of the export, which it fits as it stands."""
        return all(value.shape == shape for shape, value in self._shapes(fx_node, values))

    def _shapes(self, fx_node: fx.Node, values: Mapping[str, Any]) -> Iterator[tuple[torch.Size, Tensor]]:
        """Yield exported shape and real value of the activations that an operation reads."""
        for origin in map(self._origin, fx_node.all_input_nodes):
            exported, value = origin.meta.get("val"), values.get(origin.name)
            exported = exported[0] if isinstance(exported, (tuple, list)) else exported
            if isinstance(exported, Tensor) and isinstance(value, Tensor):
                yield exported.shape, value

    def _count(self, fx_node: fx.Node, values: Mapping[str, Any]) -> int:
        """Return how many images a dynamic program runs on, as the first value shows that is one an image."""
        for shape, value in self._shapes(fx_node, values):
            if shape and str(shape[0]) == self._symbol:
                return len(value)
        return self._images

    def _reshape(self, fx_node: fx.Node, values: Mapping[str, Tensor], batch: int) -> Tensor | None:
        """Run a view or reshape whose first size is the exported batch with the real one in its place."""
        if str(fx_node.target) not in ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"):
            return None
        source, sizes = fx_node.args
        assert isinstance(source, fx.Node)
        assert isinstance(sizes, (list, tuple))
        if sizes and sizes[0] == self.batch and all(isinstance(size, int) for size in sizes):
            return values[self._origin(source).name].reshape(
                [batch, *[int(size) for size in sizes[1:] if isinstance(size, int)]]
            )
        return None

    def _in_portions(self, node: Node, fx_node: fx.Node, values: Mapping[str, Tensor], batch: int) -> Any:
        if batch % self.batch:
            raise UnsupportedModelError(
                f"{node.name}: {batch} images are no multiple of the exported batch {self.batch}"
            )
        names = self._activation_arguments(fx_node, values)
        parts = []
        for start in range(0, batch, self.batch):
            portion = {name: values[name][start : start + self.batch] for name in names}
            parts.append(self._call(fx_node, portion))
        if isinstance(parts[0], tuple):
            return tuple(self._joined(part) for part in zip(*parts, strict=True))
        found = self._joined(parts)
        if found is None:
            raise UnsupportedModelError(
                f"{node.name} ({node.target}) does not treat its images one by one, so no forward pass over synthetic "
                "images can be made; use calibrator: analytic"
            )
        return found

    def _joined(self, parts: Sequence[Any]) -> Tensor | None:
        """Return the results of all portions behind each other; None where they are not one an image."""
        first = parts[0]
        fits = isinstance(first, Tensor) and first.dim() and first.shape[0] == self.batch
        return torch.cat(list(parts)) if fits else None

    def _origin(self, node: fx.Node) -> fx.Node:
        """Return the operation whose first result ``node`` takes out of a tuple, or ``node`` itself."""
        while node.target is operator.getitem and node.name not in self._activations:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return node

    def _activation_arguments(self, node: fx.Node, values: Mapping[str, Any]) -> list[str]:
        names = [self._origin(argument).name for argument in node.all_input_nodes]
        return [name for name in names if name in values]

    def _batch_of(self, node: fx.Node, values: Mapping[str, Any]) -> int:
        found = [values[name] for name in self._activation_arguments(node, values)]
        return next((len(value) for value in found if isinstance(value, Tensor) and value.dim()), 0)


def _placeholders(program: ExportedProgram) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return names in the state dict of the placeholders of parameters and buffers, and the tensors of constants."""
    first = canonical_names(program.state_dict)
    names, constants = {}, {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None or spec.kind is InputKind.USER_INPUT:
            continue
        if spec.target in first:
            names[spec.arg.name] = first[spec.target]
        elif isinstance(constant := program.constants.get(spec.target), Tensor):
            constants[spec.arg.name] = constant
    return names, constants


def _batch_symbol(program: ExportedProgram) -> str:
    """Return the name of the batch where it is dynamic; empty where it is a number."""
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs)
    batches = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    return next((str(batch) for batch in batches if not isinstance(batch, int)), "")


def _map_devices(arguments: Any, device: str) -> Any:
    """Put ``device`` in the place of the one that the program was exported on."""
    return fx.node.map_aggregate(
        arguments, lambda item: torch.device(device) if isinstance(item, torch.device) else item
    )


def _target(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _keeps_batch(node: fx.Node) -> bool:
    """Whether an operation that changes no value runs on any batch as it stands."""
    parts = str(node.target).split(".")
    return len(parts) > 1 and parts[1].rstrip("_") in _SAFE_IDENTITIES
