"""How two tensors of one network vary together: their linear paths from the node at which they forked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .convolve import Kernel
from .field import Field
from .torus import Torus, adjoint


@dataclass(frozen=True)
class Link:
    """A node as a linear map of its inputs (an activation by its gain): out = gain · pad(decimate(kernel · in)).

    Several sources are summed, or concatenated where ``joins``.
    """

    sources: tuple[str, ...]
    kernel: Kernel | None = None
    strides: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    gain: Tensor | None = None
    joins: bool = False

    def behind_strides(self, cross: Tensor) -> Tensor:
        """Apply what follows the decimation to a cross-spectrum [2, P, in, B]."""
        if self.pad != (0, 0):
            cross = torch.nn.functional.pad(cross, (0, 0, *self.pad))
        return cross if self.gain is None else cross * self.gain.unsqueeze(1)


@dataclass(frozen=True)
class _Path:
    """From a node down to what its decimations read: ``tail`` behind them, the node itself first."""

    tail: tuple[Link, ...]
    decimating: tuple[Link, ...]
    strides: tuple[int, int]
    source: str


class Links:
    """The linear maps of one network's nodes, and the cross-spectra that follow from them."""

    def __init__(self, order: Mapping[str, int], fields: Mapping[str, Field]) -> None:
        """Take every node's place in execution order, and the fields that are alive."""
        self.order, self.fields = order, fields
        self.links: dict[str, Link] = {}
        self.sizes: dict[str, tuple[Torus, int]] = {}
        self.products: dict[tuple[str, str], Tensor] = {}
        """Cross-spectra of layers with their inputs that are known already, by (input, layer)."""

    def note(self, name: str, field: Field, link: Link | None) -> None:
        """Keep a node's torus and channels, and its linear map where it has one."""
        self.sizes[name] = field.torus, field.channels
        if link is not None:
            self.links[name] = link

    def forget(self, source: str) -> None:
        """Let go of the products with ``source``."""
        self.products = {names: product for names, product in self.products.items() if names[0] != source}

    def cross(self, one: str, other: str) -> Tensor | None:
        """Return the cross-spectrum S_xy of two nodes on one grid, float32 [2, P, C_x, C_y]; None where none is known.

        The later of the two is replaced by what it reads until both are one node, whose spectrum must be alive.
        """
        if one == other:
            field = self.fields.get(one)
            return None if field is None else field.spectrum
        if self.order[one] < self.order[other]:
            found = self.cross(other, one)
            return None if found is None else adjoint(found)
        link = self.links.get(one)
        if link is None or (other, one) in self.products:
            return self.products.get((other, one))
        if link.strides != (1, 1):
            return self._on_fine_grid(one, other)
        return self._along(link, lambda source: self.cross(source, other))

    def _along(self, link: Link, cross_of: Callable[[str], Tensor | None]) -> Tensor | None:
        parts = [cross_of(source) for source in link.sources]
        known = [part for part in parts if part is not None]
        if not known:
            return None
        return self._mapped(link, self._joined(link, parts, known[0]) if link.joins else sum(known[1:], known[0]))

    def _mapped(self, link: Link, cross: Tensor) -> Tensor:
        if link.kernel is not None:
            cross = link.kernel.from_left(cross, self.sizes[link.sources[0]][0])
        return link.behind_strides(cross)

    def _joined(self, link: Link, parts: list[Tensor | None], known: Tensor) -> Tensor:
        points, columns = known.shape[1], known.shape[3]
        sizes = [self.sizes[source][1] for source in link.sources]
        filled = [
            known.new_zeros(2, points, size, columns) if part is None else part
            for part, size in zip(parts, sizes, strict=True)
        ]
        return torch.cat(filled, 2)

    def _on_fine_grid(self, one: str, other: str) -> Tensor | None:
        first, second = self._path(one), self._path(other)
        if first is None or second is None or first.strides != second.strides:
            return None
        grid = self.sizes[first.source][0]
        if self.sizes[second.source][0] != grid:
            return None
        found = self.cross(first.source, second.source)
        if found is None:
            return None
        found = self._heads(second, adjoint(self._heads(first, found, grid)), grid)
        _, found = grid.decimated(found, first.strides)
        return self._tails(first, adjoint(self._tails(second, found)))

    def _heads(self, path: _Path, cross: Tensor, grid: Torus) -> Tensor:
        kernel = path.decimating[-1].kernel
        return cross if kernel is None else kernel.from_left(cross, grid)

    def _tails(self, path: _Path, cross: Tensor) -> Tensor:
        for link in reversed(path.decimating):
            cross = link.behind_strides(cross)
        for link in reversed(path.tail):
            cross = self._mapped(link, cross)
        return cross

    def _path(self, name: str) -> _Path | None:
        tail: list[Link] = []
        decimating: list[Link] = []
        strides = (1, 1)
        while (link := self.links.get(name)) is not None and len(link.sources) == 1:
            fine = link.strides == (1, 1)
            if fine and decimating:
                break
            (tail if fine else decimating).append(link)
            strides = (strides[0] * link.strides[0], strides[1] * link.strides[1])
            name = link.sources[0]
            if not fine and link.kernel is not None:
                break
        return _Path(tuple(tail), tuple(decimating), strides, name) if decimating else None
