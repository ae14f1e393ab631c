"""The other closed-form, data-free methods behind one interface: rows in, codes out (docs/methods.md, "Neighbours")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dfmpc.kernels.formats import CodeFormat, Quantized
from torch import Tensor

from ...job.neighbours import NeighbourPlan
from .daq import daq
from .hqq import hqq
from .mul2q import mul2q
from .omse import omse
from .squant import squant
from .twn import twn_exact
from .vecq import vecq

RowMethod = Callable[[Tensor, CodeFormat, Any, int], Quantized]
"""Float32 [rows, length], the codes' format, the method's own plan, kernel positions -> codes."""

ROW_METHODS: Mapping[str, RowMethod] = {
    "twn-exact": twn_exact,
    "omse": omse,
    "vecq": vecq,
    "mul2q": mul2q,
    "daq": daq,
    "squant": squant,
    "hqq": hqq,
}
"""Methods that look at one layer's rows and nothing else, by their names in a job file."""


def quantize_rows(rows: Tensor, format: CodeFormat, plan: NeighbourPlan, taps: int = 1) -> Quantized:
    """Quantize a layer's ``rows`` (float16, bfloat16, float32 or float64 [rows, length]) by ``plan``'s method.

    ``format`` gives grid, width and what shares a scale; ``taps`` are the kernel's positions, neighbours in a row.

    Raises:
        KeyError: the method (dfq) needs the whole network.
        NonFiniteError: the weight holds NaN or Inf.
    """
    return ROW_METHODS[plan.method](rows.float(), format, plan, taps)
