from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc.artifact.manifest import MANIFEST, METADATA, TENSORS, Manifest, read_manifest
from dfmpc.artifact.tensors import write_tensors
from dfmpc.artifact.verify import find_artifacts, verify
from dfmpc.errors import ArtifactError
from dfmpc.kernels import Grid, pack, unpack
from safetensors.torch import load_file
from torch import Tensor


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None], metadata: dict[str, str] = METADATA) -> None:
    """Change the tensors and make the manifest's sizes and digests fit again."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    change(tensors)
    (folder / TENSORS).unlink()
    entry = write_tensors(folder / TENSORS, tensors, metadata)
    restate(folder, read_manifest(folder).model_copy(update={"files": {TENSORS: entry}}))


def restate(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def put_code(
    name: str, bits: int, length: int, row: int, column: int, code: int
) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        codes = unpack(tensors[name], bits, length)
        codes[row, column] = code
        tensors[name] = pack(codes, bits)

    return change


def test_a_whole_artifact_has_no_finding(make: Callable[..., Any], tmp_path: Path) -> None:
    make(Grid.ASYMMETRIC, 3, "group:8", input_scale={"conv": torch.ones(5)}).write(tmp_path / "a")
    result = verify(tmp_path / "a")
    assert result.findings == []
    assert (result.layers, result.files, result.checked) == (6, 1, 7)


def test_one_flipped_bit(make: Callable[..., Any], tmp_path: Path) -> None:
    manifest = make().write(tmp_path / "a")
    path = tmp_path / "a" / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    wrong, right = hashlib.sha256(data).hexdigest(), manifest.files[TENSORS].sha256
    assert verify(tmp_path / "a").findings[0] == f"{path}: sha256 {wrong}, the manifest says {right}"


def test_a_missing_file(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    (tmp_path / "a" / TENSORS).unlink()
    assert verify(tmp_path / "a").findings == [f"{tmp_path / 'a' / TENSORS}: missing"]


def test_a_wrong_size(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    path = tmp_path / "a" / TENSORS
    size = path.stat().st_size
    os.truncate(path, size - 5)
    findings = verify(tmp_path / "a").findings
    assert findings[0] == f"{path}: {size - 5} bytes, the manifest says {size}"
    assert any("cannot be read" in finding for finding in findings)


def test_a_file_too_many(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("x", encoding="utf-8")
    assert verify(tmp_path / "a").findings == [f"{tmp_path / 'a' / 'notes.txt'}: not in the manifest"]


def test_no_manifest_and_another_version(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace('"format_version": 1,\n "i', '"format_version": 2,\n "i'))
    assert verify(tmp_path / "a").findings == [
        f"{path}: format version 2; this dfmpc reads 1: use the dfmpc that wrote it"
    ]
    path.unlink()
    assert verify(tmp_path / "a").findings == [
        f"{path}: missing, so {tmp_path / 'a'} is no finished artifact; run the job again"
    ]


@pytest.mark.parametrize(
    ("grid", "bits", "code", "allowed"),
    [(Grid.TERNARY, 2, 3, "0 to 2"), (Grid.SYMMETRIC, 4, 0, "1 to 15"), (Grid.SYMMETRIC, 2, 0, "1 to 3")],
    ids=["ternary_3", "symmetric_4_0", "symmetric_2_0"],
)
def test_a_code_outside_its_grid(
    make: Callable[..., Any], tmp_path: Path, grid: Grid, bits: int, code: int, allowed: str
) -> None:
    make(grid, bits).write(tmp_path / "a")
    rewrite(tmp_path / "a", put_code("head.weight.codes", bits, 13, 7, 12, code))
    assert verify(tmp_path / "a").findings == [
        f"head.weight.codes: code {code} in row 7, column 12 (1 such in these rows); "
        f"{grid} codes of {bits} bits are {allowed}"
    ]


def change_padding(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight.codes"][3, -1] |= 0x80


def test_padding_bits_must_be_zero(make: Callable[..., Any], tmp_path: Path) -> None:
    make(Grid.DOREFA, 3).write(tmp_path / "a")
    last = int(load_file(tmp_path / "a" / TENSORS)["head.weight.codes"][3, -1])
    rewrite(tmp_path / "a", change_padding)
    assert verify(tmp_path / "a").findings == [
        f"head.weight.codes: last byte of row 3 is {last | 0x80}, its upper 1 bits must be 0"
    ]


def set_scale(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["head.weight.scale"][2, 0] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0], ids=str)
def test_a_scale_must_be_a_finite_number(make: Callable[..., Any], tmp_path: Path, value: float) -> None:
    make().write(tmp_path / "a")
    rewrite(tmp_path / "a", set_scale(value))
    assert verify(tmp_path / "a").findings == [
        f"head.weight.scale: value {value} at [2, 0]; expected finite numbers that are not negative"
    ]


def rename_codes(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"] = tensors.pop("head.weight.codes")


def widen_scale(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight.scale"] = tensors["head.weight.scale"].double()


def test_names_dtypes_and_shapes(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    make().write(tmp_path / "b")
    rewrite(tmp_path / "a", rename_codes)
    path = tmp_path / "a" / TENSORS
    assert verify(tmp_path / "a").findings == [
        f"{path}: tensor head.weight.codes is missing",
        f"{path}: tensor head.weight is not in the manifest",
    ]
    rewrite(tmp_path / "b", widen_scale, {"format": "other"})
    assert verify(tmp_path / "b").findings == [
        f"{tmp_path / 'b' / TENSORS}: metadata {{'format': 'other'}}, expected {METADATA}",
        "head.weight.scale: F64 [9, 1], expected F32 [9, 1]",
    ]


def test_bits_are_counted_from_the_bytes(make: Callable[..., Any], tmp_path: Path) -> None:
    manifest = make().write(tmp_path / "a")
    restate(tmp_path / "a", manifest.model_copy(update={"bits_per_weight": 4.0}))
    assert verify(tmp_path / "a").findings == [
        f"{tmp_path / 'a' / TENSORS}: {manifest.bits_per_weight} bits a weight, the manifest says 4.0"
    ]


def test_an_edited_manifest(make: Callable[..., Any], tmp_path: Path) -> None:
    manifest = make().write(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps(json.loads(manifest.to_json())), encoding="utf-8")
    assert verify(tmp_path / "a").findings == [f"{path}: not in the form dfmpc writes; it was edited"]
    restate(tmp_path / "a", manifest.model_copy(update={"ingredients": {**manifest.ingredients, "threads": 3}}))
    assert [finding.split(" but ")[0] for finding in verify(tmp_path / "a").findings] == [f"{path}: key {manifest.key}"]


def test_a_manifest_with_impossible_rows(make: Callable[..., Any], tmp_path: Path) -> None:
    manifest = make().write(tmp_path / "a")
    entry = manifest.layers[0].model_copy(update={"shape": (6, 5, 3, 2)})
    restate(tmp_path / "a", manifest.model_copy(update={"layers": (entry, *manifest.layers[1:])}))
    assert verify(tmp_path / "a").findings == ["conv.weight: 6 rows of 45 do not make the shape (6, 5, 3, 2)"]


def test_artifacts_of_a_store_or_folder(make: Callable[..., Any], tmp_path: Path) -> None:
    store = tmp_path / "store"
    folders = [store / "artifacts" / model / "plan" / "k" for model in ("a", "b")]
    make().write(folders[1])
    folders[0].mkdir(parents=True)
    assert find_artifacts(store) == folders
    assert find_artifacts(store / "artifacts" / "b") == [folders[1]]
    assert find_artifacts(folders[1]) == [folders[1]]
    assert find_artifacts(folders[0]) == []
    with pytest.raises(ArtifactError, match=r"nowhere: no such folder; give an artifact's folder or a store's"):
        find_artifacts(tmp_path / "nowhere")
