"""Gates: bounds on what came of a task, for a whole job and, bound by bound, for single models."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .fields import Strict

SAFE_AGREEMENT = 0.85
"""Below it an unlabelled result warns where the job says nothing of agreement: docs/fidelity.md, "The threshold"."""


class AtMost(Strict):
    """An upper bound: beyond ``warn`` it is said, beyond ``fail`` the gate closes."""

    warn: float | None = Field(None, ge=0, description="Above this the row is marked and the run goes on as if passed.")
    fail: float | None = Field(None, ge=0, description="Above this the gate is closed: exit code 3, nothing published.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_bounds(self.warn, self.fail)
        if self.warn is not None and self.fail is not None and self.warn > self.fail:
            raise ValueError(f"expected warn not above fail, got {self.warn:g} and {self.fail:g}")
        return self


class AtLeast(Strict):
    """A lower bound: below ``warn`` it is said, below ``fail`` the gate closes."""

    warn: float | None = Field(None, description="Below this the row is marked and the run goes on as if passed.")
    fail: float | None = Field(None, description="Below this the gate is closed: exit code 3, nothing published.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_bounds(self.warn, self.fail)
        if self.warn is not None and self.fail is not None and self.warn < self.fail:
            raise ValueError(f"expected warn not below fail, got {self.warn:g} and {self.fail:g}")
        return self


def _check_bounds(warn: float | None, fail: float | None) -> None:
    if warn is None and fail is None:
        raise ValueError("expected warn, fail or both")


def _as_bound(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"fail": value}
    if value is None or isinstance(value, dict | AtMost | AtLeast):
        return value
    raise ValueError("expected a number, or a mapping with warn, fail or both")


def _as_fraction(value: object) -> object:
    bound = _as_bound(value)
    for end in bound.values() if isinstance(bound, dict) else ():
        if isinstance(end, int | float) and not 0 <= end <= 1:
            raise ValueError("expected numbers from 0 to 1")
    return bound


_Most = Annotated[AtMost, BeforeValidator(_as_bound, json_schema_input_type=float | AtMost)] | None
_Least = Annotated[AtLeast, BeforeValidator(_as_bound, json_schema_input_type=float | AtLeast)] | None
_LeastFraction = Annotated[AtLeast, BeforeValidator(_as_fraction, json_schema_input_type=float | AtLeast)] | None


class Gates(Strict):
    """Bounds on finished tasks: a number closes the gate, ``{warn: x, fail: y}`` says so earlier. Not part of a key."""

    max_top1_drop: _Most = Field(None, description="Points of top-1 that may be lost; needs labels.")
    min_agreement: _LeastFraction = Field(
        None,
        description="Least top-1 agreement with the original network, 0-1. Where it is left out and images have no "
        f"labels, the default is {{warn: {SAFE_AGREEMENT:g}}} (docs/fidelity.md); null switches that off.",
    )
    min_sqnr_db: _Least = Field(None, description="Least SQNR of the logits, in dB (column logit_sqnr_db).")
    max_bits_per_weight: _Most = Field(None, description="Most bits a quantized weight, scales included.")
    max_seconds: _Most = Field(
        None, description="Most seconds to read, compress and write; what is reused was only read."
    )

    @property
    def default_agreement(self) -> AtLeast | None:
        """What stands in for ``min_agreement`` where there are no labels; None where the job spoke of it itself."""
        return None if "min_agreement" in self.model_fields_set else AtLeast(warn=SAFE_AGREEMENT)

    @model_serializer(mode="wrap")
    def _only_what_was_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run freezes its gates as JSON, and null there would be a bound that is switched off."""
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


def effective_gates(job: Gates, own: Gates | None) -> Gates:
    """Return the job's gates with the bounds that a model's ``own`` names in their place; null switches one off."""
    if own is None:
        return job
    return job.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})
