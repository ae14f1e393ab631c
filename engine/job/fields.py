"""Fields that bit-plans share: names, widths, granularities, and the strict base of every part of a job file."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Bits = Annotated[int, Field(ge=2, le=8)]


class Strict(BaseModel):
    """Base of every part of a job file: unknown fields are errors, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_name(value: str) -> str:
    if len(value) > 128 or ".." in value or not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*", value):
        raise ValueError("expected 1 to 128 letters, digits, '.', '_', '-' or '+', no '..' and no '.' in front")
    return value


Name = Annotated[str, AfterValidator(_check_name)]
"""A name that becomes a folder."""


def _check_granularity(value: str) -> str:
    if value in ("tensor", "channel"):
        return value
    match = re.fullmatch(r"group:(\d+)", value)
    if not match or int(match.group(1)) < 8 or int(match.group(1)) % 8:
        raise ValueError("expected 'tensor', 'channel' or 'group:N' with N a multiple of 8")
    return value


Granularity = Annotated[str, AfterValidator(_check_granularity)]
IN_NORM = "norm"
"""The granularity, in manifests and reports, of a layer whose channels' scales the BatchNorm behind it holds."""


class RoleGranularity(Strict):
    """A granularity for each role."""

    low: Granularity = Field("channel", description="Of the LOW layers.")
    high: Granularity = Field("channel", description="Of the HIGH and unpaired layers.")


class Plan(Strict):
    """What every bit-plan has."""

    name: Name = Field(description="Name of the plan; becomes a folder, so letters, digits, '.', '_', '-' and '+'.")
