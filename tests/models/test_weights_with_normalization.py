"""Weights whose file says the normalisation that they expect; and a real ImageNet teacher with such a file."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec

CLASSES = ["cat", "dog", "owl"]
SPEC = NetworkSpec("convnet_bn", (3, 8, 8), 3, width=4)
# the ten classes of ImageNette among ImageNet-1K's, in the order of their WordNet ids
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def load(path, **metadata):
    safetensors_io.save(path / "w.safetensors", SPEC.build(0).state_dict(), metadata)
    return pretrained.load(str(path / "w.safetensors"), SPEC, CLASSES, CLASSES)


@pytest.mark.parametrize(
    ("mean", "std"), [("0.5", "0.25"), ("127/254", "1/4"), ("[0.5, 0.5, 0.5]", '["1/4", 0.25, "0.25"]')]
)
def test_the_metadata_say_the_normalisation(tmp_path, mean, std):
    assert load(tmp_path, mean=mean, std=std).normalization == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert load(tmp_path).normalization is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"mean": "127", "std": "0.5"}, r"metadata mean must be a number from 0 to 1 .* and is '127'; correct it"),
        ({"mean": "0.5"}, r"metadata std must be a number from 0 to 1 or a JSON list of 3, one per channel, and is ''"),
        ({"mean": "0.5", "std": "0"}, r"metadata std .* is '0'"),
        ({"mean": "[0.5, 0.5]", "std": "1"}, r"metadata mean .* is '\[0\.5, 0\.5\]'"),
        ({"mean": "1/0", "std": "1"}, r"metadata mean .* is '1/0'"),
    ],
)
def test_a_normalisation_that_means_nothing_is_refused(tmp_path, metadata, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **metadata)


@pytest.mark.slow
def test_a_real_imagenet_teacher_classifies_imagenette(shared_data):
    file = shared_data.parent / "models" / "efficientnet_lite0_imagenet1k.safetensors"
    names = sorted(folder.name for folder in (shared_data / "imagenette" / "val").iterdir())
    spec = NetworkSpec("efficientnet_lite:EfficientNetLite0", (3, 224, 224), 10)
    weights = pretrained.load(str(file), spec, names, names)
    assert (weights.outputs, weights.classes) == (1000, IMAGENETTE)
    assert weights.normalization == ((127 / 255,) * 3, (128 / 255,) * 3)
    network = NetworkSpec(spec.name, spec.shape, 1000).build(0)
    network.load_state_dict(weights.state)
    view = [v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    transform, hits = v2.Compose([*view, v2.Normalize(*weights.normalization)]), torch.zeros(2)
    folders = sorted((shared_data / "imagenette" / "val").iterdir())
    for label, folder in enumerate(folders):
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in sorted(folder.iterdir())[:10]])
        with torch.no_grad():
            logits = network.eval()(images)
        right = logits.argmax(1) == IMAGENETTE[label], logits[:, IMAGENETTE].argmax(1) == label
        hits += torch.stack([own.sum() for own in right])
    assert len(folders) == 10
    assert hits[0] >= 60, "of all 600 images 72.3 % are right over the 1000 classes"
    assert hits[1] >= 96, "and 99.2 % among the ten"
