from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dfmpc.errors import DataError, NonFiniteError, StorageError
from dfmpc.evaluate import data_file
from dfmpc.evaluate.cache import Scores, cached_scores
from dfmpc.evaluate.forward import logits
from dfmpc.evaluate.images import batches, read_images
from dfmpc.evaluate.metrics import top_k
from dfmpc.evaluate.scores import evaluate_artifact
from dfmpc.evaluate.settings import EvaluationSettings, settings_for
from dfmpc.evaluate.synthetic import fidelity_images
from dfmpc.job.schema import Evaluate, Preprocess
from dfmpc.job.sources import ModelSource
from dfmpc.models.digest import tree_digest
from PIL import Image
from safetensors.torch import load_file
from torch import nn

CLASSES = 7


class Counted:
    """Builds a network and counts how often it was asked to."""

    def __init__(self, seed, change=0.0, classes=CLASSES):
        self.seed, self.change, self.classes, self.calls = seed, change, classes, 0

    def __call__(self):
        self.calls += 1
        torch.manual_seed(self.seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, self.classes)).eval()
        with torch.no_grad():
            network[1].weight += self.change * torch.randn_like(network[1].weight)
        return network


@pytest.fixture
def data(tmp_path):
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for _ in range(20):
        pixels = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8, generator=generator)
        stream = io.BytesIO()
        Image.frombytes("RGB", (6, 6), bytes(pixels.flatten().tolist())).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"image": encoded, "label": [row % CLASSES for row in range(20)]}), path)
    return path


def settings(data=None, **changes):
    fields = {"shape": (3, 6, 6), "preprocess": Preprocess(), "data": data, "top5": True} | changes
    return EvaluationSettings(**fields)


def evaluate(store, artifact, original, chosen, artifact_key="a" * 64, model_key="m" * 64):
    return evaluate_artifact(artifact, original, chosen, store=store, artifact_key=artifact_key, model_key=model_key)


def test_figures_on_labelled_images(tmp_path, data):
    original, artifact = Counted(0), Counted(0, change=0.05)
    scores = evaluate(tmp_path, artifact, original, settings(data))
    images = torch.cat([batch.images for batch in batches(read_images(data), Preprocess(), 20)])
    before, after = original()(images).detach(), artifact()(images).detach()
    labels = torch.arange(20) % CLASSES
    assert scores.top1_before == pytest.approx(100 * float((before.argmax(1) == labels).float().mean()))
    assert scores.top1_after == pytest.approx(100 * float((after.argmax(1) == labels).float().mean()))
    assert scores.top5_before == pytest.approx(top_k(before, labels, 5))
    assert scores.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).float().mean()))
    expected = 10 * torch.log10(before.square().sum() / (before - after).square().sum())
    assert scores.logit_sqnr_db == pytest.approx(float(expected), abs=1e-3)
    assert (scores.images, scores.measured_on) == (20, "images")


def test_without_data_made_up_images_give_agreement_and_sqnr_only(tmp_path):
    scores = evaluate(tmp_path, Counted(0, change=0.05), Counted(0), settings(synthetic_count=16))
    images = fidelity_images(16, (3, 6, 6), 0)
    before, after = Counted(0)()(images).detach(), Counted(0, change=0.05)()(images).detach()
    divergence = nn.functional.kl_div(
        after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert scores.kl == pytest.approx(float(divergence), rel=1e-4)
    assert scores.kl > 1e-3
    assert scores.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).float().mean()))
    assert (scores.top1_before, scores.top1_after, scores.top5_after) == (None, None, None)
    assert (scores.images, scores.measured_on) == (16, "synthetic")


def test_equal_networks_agree_without_a_ratio(tmp_path):
    scores = evaluate(tmp_path, Counted(0), Counted(0), settings())
    assert (scores.agreement, scores.kl, scores.logit_sqnr_db) == (1.0, 0.0, None)


def test_the_original_is_evaluated_once_for_many_artifacts_and_not_at_all_in_the_next_run(tmp_path, data):
    original, first, second = Counted(0), Counted(0, change=0.1), Counted(0, change=0.2)
    one = evaluate(tmp_path, first, original, settings(data), artifact_key="1" * 64)
    two = evaluate(tmp_path, second, original, settings(data), artifact_key="2" * 64)
    assert (original.calls, first.calls, second.calls) == (1, 1, 1)
    assert one.agreement > two.agreement
    assert evaluate(tmp_path, first, original, settings(data), artifact_key="1" * 64) == one
    assert (original.calls, first.calls) == (1, 1)


@pytest.mark.parametrize(
    "changes",
    [{"limit": 10}, {"preprocess": Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)}, {"data": None}],
    ids=["limit", "mean", "synthetic"],
)
def test_other_settings_are_another_evaluation(tmp_path, data, changes):
    original, artifact = Counted(0), Counted(0, change=0.1)
    evaluate(tmp_path, artifact, original, settings(data))
    evaluate(tmp_path, artifact, original, settings(**{"data": data} | changes))
    assert (original.calls, artifact.calls) == (2, 2)


def test_top5_may_be_asked_for_later_and_the_data_may_move(tmp_path, data):
    original, artifact = Counted(0), Counted(0, change=0.1)
    without = evaluate(tmp_path, artifact, original, settings(data, top5=False, seed=5))
    moved = data.rename(tmp_path / "moved.parquet")
    later = evaluate(tmp_path, artifact, original, settings(moved))
    assert (without.top5_before, without.top5_after) == (None, None)
    assert later.top5_before is not None
    assert (original.calls, artifact.calls) == (1, 1)


def test_the_cache_holds_scores_and_logits_and_no_leftovers(tmp_path, data):
    scores = evaluate(tmp_path, Counted(0, change=0.1), Counted(0), settings(data))
    files = sorted((tmp_path / "evaluations").iterdir(), key=lambda file: file.suffix)
    assert [file.suffix for file in files] == [".json", ".safetensors"]
    kept = json.loads(files[0].read_text())
    assert kept.pop("artifact") == "a" * 64  # by which gc finds scores of artifacts that are gone
    assert Scores(**kept) == scores
    files[0].write_text(json.dumps(kept))  # as earlier versions wrote it
    original = Counted(0)
    assert evaluate(tmp_path, Counted(0, change=0.1), original, settings(data)) == scores
    assert original.calls == 0
    assert load_file(files[1])["logits"].shape == (20, CLASSES)


def test_a_refactor_renames_no_file_of_the_cache(tmp_path):
    """Other names have every network evaluated anew: only a version that is raised on purpose may do that."""
    evaluate(tmp_path, Counted(0, change=0.1), Counted(0), settings(seed=3))
    assert sorted(file.name for file in (tmp_path / "evaluations").iterdir()) == [
        "04a9e38abbc5305846b48d1fac047a8dd5ca077a1522a04d8f24152e7824c56d.json",
        "f17fda031d229124b973b39a74ef898b5aff801d1d109e665c28dc3573c64ab7.safetensors",
    ]


def test_cached_scores_are_those_of_the_evaluation(tmp_path, data):
    assert cached_scores(settings(data), store=tmp_path, artifact_key="a" * 64) is None
    scores = evaluate(tmp_path, Counted(0, change=0.1), Counted(0), settings(data))
    assert cached_scores(settings(data), store=tmp_path, artifact_key="a" * 64) == scores
    assert cached_scores(settings(data), store=tmp_path, artifact_key="b" * 64) is None
    without = cached_scores(settings(data, top5=False), store=tmp_path, artifact_key="a" * 64)
    assert without == replace(scores, top5_before=None, top5_after=None)


def test_images_are_digested_once_until_the_file_is_another(tmp_path, data, monkeypatch):
    digested = []
    monkeypatch.setattr(data_file, "tree_digest", lambda path: digested.append(path) or tree_digest(path))
    evaluate(tmp_path, Counted(0, change=0.1), Counted(0), settings(data))
    assert cached_scores(settings(data), store=tmp_path, artifact_key="a" * 64) is not None
    assert digested == [data]
    state, content = data.stat(), bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    other = tmp_path / "other.parquet"
    other.write_bytes(content)
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(data)  # same name, size and time: only the inode tells
    assert cached_scores(settings(data), store=tmp_path, artifact_key="a" * 64) is None
    assert digested == [data, data]


def test_a_torn_cache_is_made_anew(tmp_path, data):
    original, artifact = Counted(0), Counted(0, change=0.1)
    scores = evaluate(tmp_path, artifact, original, settings(data))
    for file in (tmp_path / "evaluations").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    assert evaluate(tmp_path, artifact, original, settings(data)) == scores
    assert (original.calls, artifact.calls) == (2, 2)


def test_scores_of_a_version_without_kl_are_made_anew(tmp_path, data):
    artifact = Counted(0, change=0.1)
    scores = evaluate(tmp_path, artifact, Counted(0), settings(data))
    (file,) = (tmp_path / "evaluations").glob("*.json")
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "kl"}))
    assert cached_scores(settings(data), store=tmp_path, artifact_key="a" * 64) is None
    original = Counted(0)
    assert evaluate(tmp_path, artifact, original, settings(data)) == scores
    assert (original.calls, artifact.calls) == (0, 2), "the original's logits are kept"


def test_a_label_outside_the_classes_names_its_row(tmp_path, data):
    said = r"evaluate\.data .*set\.parquet row 4: label 4, resnet has 4 classes: give the images"
    with pytest.raises(DataError, match=said):
        evaluate(tmp_path, Counted(0, classes=4), Counted(1, classes=4), settings(data, model="resnet"))


def test_another_number_of_classes_is_an_error(tmp_path, data):
    with pytest.raises(DataError, match=r"the original's logits are \(20, 7\), the artifact's \(20, 4\)"):
        evaluate(tmp_path, Counted(0, classes=4), Counted(0), settings(data))


def test_a_network_that_gives_nan_is_named_and_not_cached(tmp_path):
    with pytest.raises(NonFiniteError, match="the compressed network gives NaN or Inf in 128 of 128 rows"):
        evaluate(tmp_path, Counted(0, change=float("nan")), Counted(0), settings())
    assert not list((tmp_path / "evaluations").glob("*.json"))


def test_a_store_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "evaluations").write_text("a file where the folder belongs")
    with pytest.raises(StorageError, match="evaluations"):
        evaluate(tmp_path, Counted(0), Counted(0), settings())


def test_settings_from_a_job(tmp_path):
    source = ModelSource(name="net", preprocess=Preprocess(mean=(0.1,) * 3, std=(0.2,) * 3, crop=6))
    job = Evaluate(data="set.parquet", limit=9, metrics=["top1", "top5"], crop=5)
    assert settings_for(job, source, (1, 3, 6, 6), 3, tmp_path) == EvaluationSettings(
        (3, 6, 6), source.preprocess, tmp_path / "set.parquet", limit=9, top5=True, seed=3
    )
    plain = settings_for(Evaluate(data="/x/set.parquet", crop=5), ModelSource(name="net"), (2, 3, 5, 5))
    assert plain.preprocess == Preprocess(crop=5)
    assert (str(plain.data), plain.top5) == ("/x/set.parquet", False)


@pytest.mark.parametrize(
    ("shape", "count", "batch"),
    [((1, 3, 127, 127), 128, 64), ((1, 3, 224, 224), 64, 16), ((1, 3, 900, 900), 32, 16), ((1, 300), 128, 64)],
    ids=str,
)
def test_synthetic_images_by_input_size(shape, count, batch):
    chosen = settings_for(None, ModelSource(name="net"), shape, 1)
    assert (chosen.data, chosen.synthetic_count, chosen.seed, chosen.shape) == (None, count, 1, shape[1:])
    assert (chosen.batch_size, chosen.measured_on) == (batch, "synthetic")


def test_resnet20_on_the_first_500_images(shared, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(shared / "models"), *sys.path])
    import cifar_models  # noqa: PLC0415 - on the path from here only

    network = cifar_models.resnet20().eval()
    network.load_state_dict(load_file(shared / "models" / "resnet20.safetensors"))
    images = read_images(shared / "data" / "cifar10_test.parquet", 500)
    preprocess = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    found = logits(network, (batch.images for batch in batches(images, preprocess, 64, (3, 32, 32))))
    assert 88 < top_k(found, images.labels, 1) < 95
