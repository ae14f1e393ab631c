"""A size instead of bits: what a bit-plan with ``budget`` may take (docs/methods.md, "Bit-plans by size")."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .fields import Plan, Strict

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)")
_FACTORS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _byte_count(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError("expected a whole number of bytes, or a number with a unit, such as 1.5MB or 800KiB")
    return int(float(match.group(1)) * _FACTORS[match.group(2)])


class Budget(Strict):
    """How much the compressed model may take, in one of three units; the bits of every layer follow from it."""

    bits_per_weight: float | None = Field(
        None, ge=2, le=16, description="Most bits of codes and scales a quantized weight, such as 3.0."
    )
    bytes: Annotated[int, BeforeValidator(_byte_count, json_schema_input_type=int | str)] | None = Field(
        None, gt=0, description="Most bytes of the artifact's files, a number or such as 1.5MB."
    )
    ratio: float | None = Field(
        None, gt=1, le=64, description="Least ratio of the checkpoint's bytes to the artifact's, such as 8."
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        given = [name for name in ("bits_per_weight", "bytes", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of bits_per_weight, bytes, ratio; got {', '.join(given) or 'none'}")
        return self

    def __str__(self) -> str:
        """Return the budget as messages write it."""
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g} bits a weight"
        return f"{self.bytes:,} bytes" if self.bytes is not None else f"a ratio of {self.ratio:g}"


class SizedPlan(Plan):
    """A bit-plan whose widths ``low`` and ``high`` may be replaced by a budget."""

    budget: Budget | None = Field(
        None, description="A size in place of low and high: {bits_per_weight}, {bytes} or {ratio}; bits follow a layer."
    )
    pareto: int | None = Field(
        None, ge=2, le=64, description="Beside budget: how many points of the curve of size against error to report."
    )

    @model_validator(mode="after")
    def _budget_or_widths(self) -> Self:
        widths = [name for name in ("low", "high") if name in self.model_fields_set]
        if self.budget is not None and widths:
            raise ValueError(f"expected either a budget or widths; got budget beside {' and '.join(widths)}")
        if self.pareto is not None and self.budget is None:
            raise ValueError("expected a budget beside pareto")
        return self

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Written plans are read again, and there a default width would look like one that was asked for.
        fields: dict[str, Any] = handler(self)
        unsaid = ("budget", "pareto") if self.budget is None else ("low", "high")
        return {name: value for name, value in fields.items() if name not in unsaid}
