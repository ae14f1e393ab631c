"""What a job file says of an MLflow model registry: which models to take, and what to register of them."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from .fields import Strict

_URI = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://.+")


def _checked_uri(value: str) -> str:
    if not _URI.fullmatch(value):
        raise ValueError("expected a database or a server, such as sqlite:///mlflow.db or https://mlflow.example.org")
    return value


Text = Annotated[str, Field(min_length=1)]


class MlflowPublish(Strict):
    """What is registered of every task whose gate is not closed; ``{model}`` and ``{plan}`` stand for its names."""

    model: Text = Field("{model}-dfmpc", description="Name of the registered model that gets the new versions.")
    alias: Text | None = Field("{plan}", description="Alias that is moved to the version to use; null: none.")
    experiment: Text = Field("dfmpc", description="Experiment that gets a run a version, with report row and files.")

    @model_validator(mode="after")
    def _tells_tasks_apart(self) -> Self:
        if "{model}" not in self.model or self.model in ("{model}", "{model}{plan}", "{plan}{model}"):
            raise ValueError("expected {model} and text of its own in model, such as {model}-dfmpc")
        if self.alias is not None and "{plan}" not in self.model + self.alias:
            raise ValueError("expected {plan} in model or alias: the alias would wander between bit-plans")
        return self


class MlflowModels(Strict):
    """Models of an MLflow registry: versions whose artifacts hold one .pt2 program, or a dfmpc.yaml and its files."""

    uri: Annotated[str, AfterValidator(_checked_uri)] = Field(
        description="Tracking URI of MLflow's server or database; the path of sqlite:///PATH counts from the job file."
    )
    models: list[Text] = Field(
        default=["*"], min_length=1, description="Names of registered models, or patterns; each must match one."
    )
    alias: Text | None = Field(
        None, description="Take the version with this alias, and no model without it; default: the newest version."
    )
    publish: bool | MlflowPublish = Field(
        False, description="Register what tasks leave as new versions: true, or a mapping with names of your own."
    )

    @property
    def publishing(self) -> MlflowPublish | None:
        """What to register, defaults filled in; None where nothing."""
        if isinstance(self.publish, bool):
            return MlflowPublish() if self.publish else None
        return self.publish
