from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest
from dfmpc.artifact import key as key_module
from dfmpc.artifact.key import KEY_VERSION, TaskKey, digest_of, evaluation_key, explain, task_key
from dfmpc.job.methods import BitPlan, DfmpcPlan, RtnPlan
from dfmpc.job.neighbours import OmsePlan
from dfmpc.job.recipes import RECIPES_VERSION
from dfmpc.job.schema import LayerRule
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.kernels.formats import NUMERICS_VERSION
from dfmpc.models.pairs import PAIRING_VERSION

A, B = "a" * 64, "b" * 64
SOURCE: dict[str, Any] = {
    "name": "net",
    "factory": "zoo:make",
    "args": ["small"],
    "kwargs": {"width": 2},
    "checkpoint": "/somewhere/net.safetensors",
    "program": None,
    "input": [1, 3, 8, 8],
    "preprocess": None,
}
RTN: dict[str, Any] = {"name": "rtn4", "method": "rtn", "bits": 4}
DFMPC: dict[str, Any] = {"name": "mp", "method": "dfmpc"}


def key_of(
    source: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    rules: list[LayerRule] | None = None,
    digests: tuple[str, ...] = (A,),
    distribution: str | None = "zoo==1.0",
    **numerics: Any,
) -> TaskKey:
    fields = {**RTN, **(plan or {})}
    chosen = RtnPlan(**fields) if fields["method"] == "rtn" else DfmpcPlan(**(plan or {}))
    model = ModelSource(**{**SOURCE, **(source or {})})
    task = Task(id=f"{model.name}/{chosen.name}", model=model, plan=chosen, layers=rules or [])
    return task_key(task, digests, distribution=distribution, **numerics)


def test_a_key_is_a_digest_with_a_short_form() -> None:
    key = key_of()
    assert re.fullmatch(r"[0-9a-f]{64}", key.key)
    assert key.short == key.key[:12]


def test_ingredients_of_a_fixed_task() -> None:
    assert key_of().ingredients == {
        "key_version": KEY_VERSION,
        "format_version": 1,
        "numerics_version": NUMERICS_VERSION,
        "recipes_version": RECIPES_VERSION,
        "pairing_version": PAIRING_VERSION,
        "dtypes": {"weights": "float32", "statistics": "float64", "scales": "float32"},
        "source": {
            "factory": "zoo:make",
            "args": ["small"],
            "kwargs": {"width": 2},
            "input": [1, 3, 8, 8],
            "distribution": "zoo==1.0",
            "inputs": [{"role": "checkpoint", "digest": A}],
            "torch": None,
        },
        "recipe": "",
        "calibrator": None,
        "numerics": None,
        "plan": {"method": "rtn", "bits": 4, "granularity": "channel", "symmetric": True},
        "layers": [],
    }


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (RtnPlan(name="p", method="rtn", bits=4), "e0a3acd898bda32902d02334266c843164c692998151878719a9b94b59d12231"),
        (
            DfmpcPlan(name="p", method="dfmpc", recipe="published"),
            "5664b0198eae2054e310b35f559918db85404f47a7335fab920ae617ef44f36d",
        ),
        (
            DfmpcPlan(name="p", method="dfmpc"),
            "69b498153345a6df872ef5111b9eac22721a50ad81c48b02db46dee36425b913",
        ),
        (
            OmsePlan(name="p", method="omse", bits=4),
            "dd0f0fa8a01cf692f7daeeefcd37a7dcf36b6625c66cc0d8bdb78c5d6d95f3e2",
        ),
    ],
    ids=["rtn", "published", "auto", "neighbour"],
)
def test_a_refactor_changes_no_key(monkeypatch: pytest.MonkeyPatch, plan: BitPlan, expected: str) -> None:
    """Another key makes every artifact in every store anew: only a version that is raised on purpose may do that."""
    monkeypatch.setattr(key_module, "torch_version", lambda: "2.8.0")
    task = Task(id="net/p", model=ModelSource(**SOURCE), plan=plan)
    assert task_key(task, (A,), distribution="zoo==1.0").key == expected


def test_key_is_sha256_of_canonical_json() -> None:
    value = {"b": [1, 2.5, None, True], "a": "Δ"}
    text = '{"a":"Δ","b":[1,2.5,null,true]}'
    assert digest_of(value) == hashlib.sha256(text.encode()).hexdigest()
    assert key_of().key == digest_of(key_of().ingredients)


@pytest.mark.parametrize(
    "same",
    [
        {"source": {"name": "other"}},
        {"source": {"checkpoint": "/elsewhere/x.pth"}},
        {"plan": {"name": "another-name"}},
        {"plan": {"granularity": "channel"}},
    ],
    ids=["model_name", "path", "plan_name", "default_spelt_out"],
)
def test_what_does_not_enter_the_key(same: dict[str, Any]) -> None:
    assert key_of(**same).key == key_of().key


@pytest.mark.parametrize(
    "other",
    [
        {"digests": (B,)},
        {"digests": (A, B)},
        {"distribution": "zoo==1.1"},
        {"source": {"factory": "zoo:make2"}},
        {"source": {"args": ["large"]}},
        {"source": {"kwargs": {"width": 3}}},
        {"source": {"input": [1, 3, 16, 16]}},
        {"plan": {"bits": 5}},
        {"plan": {"symmetric": False}},
        {"rules": [LayerRule(match="stem", bits=8)]},
    ],
    ids=["input", "shard", "distribution", "factory", "args", "kwargs", "shape", "bits", "method_option", "layer_rule"],
)
def test_what_enters_the_key(other: dict[str, Any]) -> None:
    assert key_of(**other).key != key_of().key


def test_order_of_shards_and_of_rules_matters() -> None:
    assert key_of(digests=(A, B)).key != key_of(digests=(B, A)).key
    stem, head = LayerRule(match="*", bits=8), LayerRule(match="head", bits=2)
    assert key_of(rules=[stem, head]).key != key_of(rules=[head, stem]).key


def test_a_program_and_a_checkpoint_of_the_same_bytes_differ() -> None:
    program = {"factory": None, "args": [], "kwargs": {}, "checkpoint": None, "input": None, "program": "/x/net.pt2"}
    key = key_of(source=program, distribution=None)
    assert key.key != key_of().key
    source = key.ingredients["source"]
    assert isinstance(source, dict)
    assert source["inputs"] == [{"role": "program", "digest": A}]
    assert "/x" not in str(key.ingredients)


def dfmpc(calibrator: object = None, **fields: Any) -> dict[str, Any]:
    return {**DFMPC, **({} if calibrator is None else {"calibrator": calibrator}), **fields}


SYNTHETIC = dfmpc({"name": "synthetic"})
NORMALISED = {"preprocess": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}}


@pytest.mark.parametrize(
    "other",
    [
        {"plan": dfmpc({"name": "synthetic", "seed": 1})},
        {"plan": dfmpc({"name": "synthetic", "prior": "noise"})},
        {"plan": dfmpc({"name": "synthetic", "images": 64})},
        {"source": NORMALISED},
        {"device": "cuda:0"},
        {"threads": 2},
    ],
    ids=["seed", "prior", "images", "normalisation", "device", "threads"],
)
def test_what_enters_the_key_of_the_synthetic_tier(other: dict[str, Any]) -> None:
    assert key_of(**{"plan": SYNTHETIC, **other}).key != key_of(plan=SYNTHETIC).key


def test_versions_of_torch_and_of_the_images_enter_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(plan=SYNTHETIC)
    monkeypatch.setattr(key_module, "torch_version", lambda: "0.0.0")
    assert explain(before.ingredients, key_of(plan=SYNTHETIC).ingredients).startswith("numerics.torch: ")
    monkeypatch.undo()
    monkeypatch.setattr(key_module, "PRIORS_VERSION", 999)
    assert explain(before.ingredients, key_of(plan=SYNTHETIC).ingredients).startswith("calibrator.priors_version: ")


@pytest.mark.parametrize(
    "same",
    [
        {"device": "cuda:1"},
        {"plan": SYNTHETIC},
        {"source": {"preprocess": {**NORMALISED["preprocess"], "crop": 4}}},
    ],
    ids=["which_gpu", "default_calibrator", "crop"],
)
def test_what_does_not_enter_the_key_of_the_synthetic_tier(same: dict[str, Any]) -> None:
    """The default calibrator is the synthetic one; the plan as it is written enters too, so its key may differ."""
    base = {"plan": dfmpc(), "device": "cuda:0", "source": NORMALISED}
    first, second = (key_of(**fields).ingredients for fields in (base, {**base, **same}))
    for part in ("calibrator", "numerics", "recipe"):
        assert first[part] == second[part]
    assert same.keys() == {"plan"} or first == second


@pytest.mark.parametrize("preprocess", [{}, {"crop": 4}, {"resize": 8}], ids=["nothing", "crop", "resize"])
def test_labels_added_later_leave_the_key_alone_where_they_bring_no_normalisation(preprocess: dict[str, int]) -> None:
    assert key_of({"preprocess": preprocess}, SYNTHETIC).key == key_of(plan=SYNTHETIC).key


@pytest.mark.parametrize("elsewhere", [{"device": "cuda:0"}, {"threads": 8}, {"source": NORMALISED}], ids=str)
@pytest.mark.parametrize(
    "plan",
    [
        RTN,
        dfmpc(recipe="published"),
        dfmpc("none"),
        dfmpc("norm"),
        dfmpc({"name": "analytic", "moments": "channel"}),
        {**RTN, "name": "o", "granularity": "tensor"},
    ],
    ids=["rtn", "published", "none", "norm", "channel", "rtn_by_tensor"],
)
def test_recipes_of_exact_sums_have_one_key_everywhere(plan: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    assert key_of(plan=plan).ingredients["numerics"] is None
    assert key_of(plan=plan, **elsewhere).key == key_of(plan=plan).key


@pytest.mark.parametrize(
    "plan",
    [
        dfmpc("analytic"),
        dfmpc(recipe="published", rounding="feedback"),
        dfmpc(recipe="published", compensate="least-squares"),
        dfmpc({"name": "analytic", "moments": "spectral"}, recipe="published"),
    ],
    ids=["spectral", "feedback", "least-squares", "published_with_spectra"],
)
def test_recipes_that_factorise_name_device_threads_and_torch(plan: dict[str, Any]) -> None:
    numerics = key_of(plan=plan, device="cuda:3", threads=4).ingredients["numerics"]
    assert isinstance(numerics, dict)
    assert (numerics["device"], numerics["threads"]) == ("cuda", 4)
    assert numerics.keys() == {"device", "threads", "torch"}


def test_what_auto_stands_for_enters_the_key() -> None:
    assert "least-squares" in str(key_of(plan=SYNTHETIC).ingredients["recipe"])
    assert key_of(plan=dfmpc("norm")).key != key_of(plan=dfmpc("norm", recipe="published")).key


def test_explain_names_what_differs() -> None:
    old = key_of().ingredients
    assert explain(old, key_of(plan={"bits": 5}).ingredients) == "plan.bits: 4 → 5"
    changed = key_of(digests=(B,), rules=[LayerRule(match="stem", bits=8)]).ingredients
    text = explain(old, changed)
    assert f'source.inputs[0].digest: "{A}" → "{B}"' in text
    assert 'layers[0].match: absent → "stem"' in text
    assert explain(old, key_of().ingredients) == "no ingredient differs"


def test_evaluation_key_depends_on_artifact_settings_and_data() -> None:
    settings = {"crop": 32, "metrics": ["top1"]}
    base = evaluation_key(A, settings, B)
    assert base == evaluation_key(A, {"metrics": ["top1"], "crop": 32}, B)
    others = {
        evaluation_key(B, settings, B),
        evaluation_key(A, {**settings, "crop": 28}, B),
        evaluation_key(A, settings, A),
        evaluation_key(A, settings, None),
    }
    assert len(others | {base}) == 5
