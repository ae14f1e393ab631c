"""One network over many batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx, nn

from ..errors import NonFiniteError, UnsupportedModelError


def logits(
    module: nn.Module,
    batches: Iterable[Tensor],
    device: str = "cpu",
    batch_size: int | None = None,
    name: str = "the network",
) -> Tensor:
    """Return the outputs of ``module`` for all images of ``batches`` (float32 [n, C, H, W]): float32 [N, classes].

    ``batch_size`` is the only batch that the module takes (a program exported with a static batch); None: it is looked
    up in the program, and other modules take any. The module is moved to ``device`` and stays there; the result is on
    the CPU. An output with axes behind the classes counts every position as a row. ``name`` is for error texts.

    Raises UnsupportedModelError where the input or the output is of a kind that evaluation does not know (token ids,
    several tensors), NonFiniteError where logits are NaN or Inf.
    """
    _check_input(module, name)
    module = module.to(device)
    size = batch_size or static_batch(module)
    found = []
    with torch.inference_mode():
        for batch in batches:
            for images, kept in _portions(batch, size):
                found.append(_rows(module(images.to(device)), kept, name))
    result = torch.cat(found)
    bad = int((~result.isfinite().all(dim=1)).sum())
    if bad:
        raise NonFiniteError(f"{name} gives NaN or Inf in {bad} of {len(result)} rows of logits: it is unusable")
    return result


def static_batch(module: nn.Module) -> int | None:
    """Return the batch that an exported program (or one inside ``module``) was fixed to, None where any will do."""
    batches = (value.shape[0] for value in _traced_inputs(module) if value.ndim)
    return next((int(batch) for batch in batches if isinstance(batch, int)), None)


def _traced_inputs(module: nn.Module) -> Iterator[Tensor]:
    """Yield what an exported program (or one inside ``module``) was traced with; nothing for other modules."""
    graphs = (part.graph for part in module.modules() if isinstance(part, fx.GraphModule))
    inputs = (node.meta.get("val") for graph in graphs for node in graph.find_nodes(op="placeholder"))
    return (value for value in inputs if isinstance(value, Tensor))


def _check_input(module: nn.Module, name: str) -> None:
    traced = next(_traced_inputs(module), None)
    if traced is not None and not traced.is_floating_point():
        kind = f"{str(traced.dtype).removeprefix('torch.')} {[str(size) for size in traced.shape]}".replace("'", "")
        raise UnsupportedModelError(
            f"{name} takes {kind}, and evaluation feeds float32 images or noise: the artifact itself is complete; to "
            "have it evaluated, export the network from behind its embedding, where its input is of a floating type"
        )


def _portions(batch: Tensor, size: int | None) -> Iterator[tuple[Tensor, int]]:
    """Cut ``batch`` into portions of exactly ``size``, the last filled up by repetition, with how many rows count."""
    if size is None:
        yield batch, len(batch)
        return
    for start in range(0, len(batch), size):
        portion = batch[start : start + size]
        filler = portion[-1:].expand(size - len(portion), *portion.shape[1:])
        yield torch.cat([portion, filler]), len(portion)


def _rows(output: object, kept: int, name: str) -> Tensor:
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim == 0:
        raise UnsupportedModelError(
            f"{name} returned {type(output).__name__} where evaluation needs one tensor of logits [N, classes]"
        )
    scores = output[:kept].float().cpu()
    if scores.ndim == 1:
        return scores.unsqueeze(1)
    return scores if scores.ndim == 2 else scores.movedim(1, -1).reshape(-1, scores.shape[1])
