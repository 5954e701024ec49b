"""The weights of torchvision: found by name or file, with their classes and normalization, for its networks and ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from weight_cases import load, same

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec

IDS = [f"n{i:08d}" for i in range(1000, 2000)]  # in the form of ImageNet's
RESNET_FILE = "resnet18-f37072fd.pth"
RESNET = "ResNet18_Weights.IMAGENET1K_V1"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def resnets():
    """torchvision's networks of 18 and 50 layers with random weights, and statistics that are not the initial ones."""
    from torchvision.models import get_model

    networks = {}
    for layers in (18, 50):
        torch.manual_seed(layers)
        networks[layers] = get_model(f"resnet{layers}").eval()
        for module in networks[layers].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return networks


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch's folder of downloaded weights, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("layers", [18, 50])
@torch.no_grad()
def test_torchvisions_weights_give_torchvisions_logits(tmp_path, resnets, layers):
    torch.save(resnets[layers].state_dict(), tmp_path / "w.pth")
    names = [f"class {i}" for i in range(1000)]
    spec = NetworkSpec(f"resnet{layers}_bn", (3, 224, 224), 1000)
    network = spec.build(0).eval()
    network.load_state_dict(load(tmp_path / "w.pth", spec, names).state)
    images = torch.randn(2, 3, 224, 224)
    expected = resnets[layers](images)
    assert torch.allclose(network(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("network", ["resnet18_bn", "torchvision:resnet18"])
@pytest.mark.parametrize("name", [RESNET, "ResNet18_Weights.DEFAULT", RESNET_FILE])
def test_published_weights_are_found_offline_by_name(hub, resnets, network, name):
    torch.save(resnets[18].state_dict(), hub / RESNET_FILE)
    weights = load(name, NetworkSpec(network, (3, 224, 224), 1000), IDS)
    assert (weights.outputs, weights.classes, weights.normalization) == (1000, None, IMAGENET)
    assert torch.equal(weights.state[next(iter(weights.state))], resnets[18].conv1.weight)


def test_a_file_called_as_a_published_one_has_another_digest_as_it_is_normalised_otherwise(tmp_path, resnets):
    for name in (RESNET_FILE, "mine.pth"):
        torch.save(resnets[18].state_dict(), tmp_path / name)
    published, mine = pretrained.digests([str(tmp_path / RESNET_FILE), str(tmp_path / "mine.pth")]).values()
    assert published != mine


def test_a_published_file_at_another_path_is_recognised(tmp_path, resnets):
    torch.save(resnets[18].state_dict(), tmp_path / RESNET_FILE)
    weights = load(tmp_path / RESNET_FILE, NetworkSpec("resnet18_bn", (3, 96, 96), 1000), IDS)
    assert weights.normalization == IMAGENET


def test_files_without_counters_of_batches_load(tmp_path, resnets):
    """Older files, and those of other libraries, lack what only training needs."""
    kept = {key: value for key, value in resnets[18].state_dict().items() if "num_batches" not in key}
    torch.save(kept, tmp_path / RESNET_FILE)
    weights = load(tmp_path / RESNET_FILE, NetworkSpec("resnet18_bn", (3, 96, 96), 1000), IDS)
    assert weights.state["net.bn1.num_batches_tracked"] == 0


def test_old_names_of_densenets_layers_are_known(tmp_path):
    import re

    spec = NetworkSpec("torchvision:densenet121", (3, 64, 64), 3)
    state = spec.build(0).state_dict()
    old = {re.sub(r"(norm|conv)([12]\.)", r"\1.\2", k) if "denselayer" in k else k: v for k, v in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    assert same(load(tmp_path / "old.pth", spec).state, state)


@pytest.mark.parametrize("name", ["mnasnet0_5", "vit_b_32", "squeezenet1_1"])
def test_other_networks_of_torchvision_take_their_weights(tmp_path, name):
    """MNASNet needs the version of its state dict, which files do not keep."""
    spec = NetworkSpec(f"torchvision:{name}", (3, 224, 224), 3)
    state = spec.build(3).state_dict()
    safetensors_io.save(tmp_path / "w.safetensors", state)
    weights = load(tmp_path / "w.safetensors", spec)
    assert same(weights.state, state)
    spec.build(0).load_state_dict(weights.state)
    del state[next(iter(state))]
    safetensors_io.save(tmp_path / "w.safetensors", state)
    with pytest.raises(UserError, match=rf"w\.safetensors does not fit score\.network = 'torchvision:{name}'"):
        load(tmp_path / "w.safetensors", spec)


def test_missing_published_weights_name_the_file_and_its_folder(hub):
    spec = NetworkSpec("resnet18_bn", (3, 96, 96), 1000)
    for name in (RESNET, RESNET_FILE):
        with pytest.raises(UserError, match=rf"put torchvision's file {RESNET_FILE} at {hub / RESNET_FILE}"):
            load(name, spec, IDS)


@pytest.mark.parametrize(
    ("name", "near"),
    [("ResNet18_Weights.IMAGENET1K_V3", RESNET), ("resnet18-f37072fe.pth", RESNET_FILE)],
)
def test_published_names_that_are_wrong_name_the_nearest(hub, name, near):
    with pytest.raises(UserError, match=f"publishes none of that name; did you mean {near}"):
        load(name, NetworkSpec("resnet18_bn", (3, 96, 96), 1000), IDS)


def test_published_weights_take_the_class_names_that_torchvision_lists(hub, resnets):
    from torchvision.models import ResNet18_Weights

    torch.save(resnets[18].state_dict(), hub / RESNET_FILE)
    names = list(ResNet18_Weights.DEFAULT.meta["categories"])
    spec = NetworkSpec("resnet18_bn", (3, 96, 96), 1000)
    assert load(RESNET, spec, names).classes is None
    names[3], names[4] = names[4], names[3]
    with pytest.raises(UserError, match=r"class 3 is 'hammerhead' where 'tiger shark' should be"):
        load(RESNET, spec, names)


def test_published_weights_refuse_ids_out_of_order(hub, resnets):
    torch.save(resnets[18].state_dict(), hub / RESNET_FILE)
    swapped = [*IDS[:10], IDS[11], IDS[10], *IDS[12:]]
    with pytest.raises(
        UserError, match=rf"the data's class 11 is '{IDS[10]}' where the next id in order should.*data\.class_names"
    ):
        load(RESNET, NetworkSpec("resnet18_bn", (3, 96, 96), 1000), swapped)


def test_published_weights_score_a_subset_of_imagenet(hub, resnets):
    torch.save(resnets[18].state_dict(), hub / RESNET_FILE)
    chosen, spec = [IDS[900], IDS[2], IDS[30]], NetworkSpec("resnet18_bn", (3, 96, 96), 3)
    weights = load(RESNET, spec, chosen, IDS)
    assert (weights.outputs, weights.classes) == (1000, [900, 2, 30])
    with pytest.raises(UserError, match=r"1000 classes, the data has 3; .*name the data's classes by .*WordNet ids"):
        load(RESNET, spec, chosen)


def test_a_folder_of_some_imagenet_classes_takes_their_outputs(hub, resnets):
    ids = pretrained.imagenet_ids()
    assert len(set(ids)) == 1000
    assert ids == sorted(ids)
    assert (ids[0], ids[217], ids[701], ids[999]) == ("n01440764", "n02102040", "n03888257", "n15075141")
    torch.save(resnets[18].state_dict(), hub / RESNET_FILE)
    weights = load(RESNET, NetworkSpec("resnet18_bn", (3, 96, 96), 2), [ids[701], ids[0]])
    assert (weights.outputs, weights.classes) == (1000, [701, 0])


def test_published_weights_name_the_network_that_they_fit(hub, resnets):
    torch.save(resnets[18].state_dict(), hub / RESNET_FILE)
    for name, side in (("resnet50_bn", 96), ("resnet18", 96), ("resnet18_bn", 64)):
        with pytest.raises(UserError, match=r"does not fit.*\(torchvision published them for torchvision:resnet18\)"):
            load(RESNET, NetworkSpec(name, (3, side, side), 1000), IDS)


def test_published_weights_of_videos_are_known_too(hub):
    from torchvision.models import video

    torch.manual_seed(0)
    network, names = video.r3d_18(), list(video.R3D_18_Weights.KINETICS400_V1.meta["categories"])
    torch.save(network.state_dict(), hub / "r3d_18-b3b3357e.pth")
    spec = NetworkSpec("r3d_18_bn", (8, 3, 64, 64), 400)
    weights = load("R3D_18_Weights.KINETICS400_V1", spec, names)
    assert (weights.outputs, weights.classes) == (400, None)
    mine = spec.build(1).eval()
    mine.load_state_dict(weights.state)
    clips = torch.rand(1, 8, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(mine(clips), network.eval()(clips.transpose(1, 2)))
    with pytest.raises(UserError, match=r"class 1 is 'applauding' where 'air drumming' should be.*data\.class_names"):
        load("R3D_18_Weights.KINETICS400_V1", spec, ["abseiling", "applauding", *names[2:]])
    with pytest.raises(UserError, match=r"torchvision published them for r3d_18_bn\)"):
        load("R3D_18_Weights.KINETICS400_V1", NetworkSpec("r3d_18", (8, 3, 64, 64), 400), names)
