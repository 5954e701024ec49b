"""Ready-networks weights: every format comes back tensor for tensor, and what does not fit is refused with one error."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections import OrderedDict

import pytest
import torch
from torch import nn

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec

CLASSES = ["cat", "dog", "owl"]
SPEC = NetworkSpec("convnet", (3, 8, 8), 3, width=4)
STATE = SPEC.build(7).state_dict()
WIDE = ["ant", *CLASSES, "yak"]  # classes of a source of which CLASSES are a subset
WIDE_STATE = NetworkSpec("convnet", (3, 8, 8), 5, width=4).build(7).state_dict()
IDS = [f"n{i:08d}" for i in range(1000, 2000)]  # in the form of ImageNet's
RESNET_FILE = "resnet18-f37072fd.pth"
RESNET = "ResNet18_Weights.IMAGENET1K_V1"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load(path, spec=SPEC, classes=CLASSES, source=None):
    return pretrained.load(str(path), spec, classes, classes if source is None else source)


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


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


def in_safetensors(path):
    safetensors_io.save(path, STATE)


def in_safetensors_with_classes(path):
    safetensors_io.save(path, STATE, {"class_names": json.dumps(CLASSES)})


def in_own_checkpoint(path):
    saved = {f"weight.{key}": value for key, value in STATE.items()} | {"momentum.0": torch.ones(2)}
    safetensors_io.save(path, saved, {"class_names": json.dumps(CLASSES)})


def as_state_dict(path):
    torch.save(STATE, path)


def as_old_state_dict(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def in_a_training_checkpoint(path):
    prefixed = OrderedDict((f"module.{key}", value) for key, value in STATE.items())
    torch.save({"epoch": 3, "state_dict": prefixed, "optimizer": {"lr": 0.1}}, path)


def of_a_compiled_network(path):
    torch.save({"model": {f"module._orig_mod.{key}": value for key, value in STATE.items()}}, path)


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (in_safetensors, "safetensors"),
        (in_safetensors_with_classes, "safetensors"),
        (in_own_checkpoint, "safetensors"),
        (as_state_dict, "pt"),
        (as_state_dict, "pth"),
        (as_old_state_dict, "pth"),
        (in_a_training_checkpoint, "pth"),
        (of_a_compiled_network, "pt"),
    ],
)
def test_every_format_comes_back_tensor_for_tensor(tmp_path, write, suffix):
    path = tmp_path / f"weights.{suffix}"
    write(path)
    weights = load(path)
    assert same(weights.state, STATE)
    assert (weights.outputs, weights.classes, weights.normalization) == (3, None, None)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    SPEC.build(0).load_state_dict(weights.state)


def test_half_precision_becomes_float32(tmp_path):
    safetensors_io.save(tmp_path / "w.safetensors", {key: value.half() for key, value in STATE.items()})
    assert same(load(tmp_path / "w.safetensors").state, {key: value.half().float() for key, value in STATE.items()})


def test_digests_follow_the_content_and_not_the_place(tmp_path):
    first, moved, other = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "c"))
    for path, state in ((first, STATE), (moved, STATE), (other, WIDE_STATE)):
        safetensors_io.save(tmp_path / path, state)
    actual = pretrained.digests([first, moved, other])
    assert actual[first] == actual[moved] != actual[other]


class Hostile:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_pickle_is_refused_without_running(tmp_path, new):
    path, mark = tmp_path / "weights.pth", tmp_path / "it ran"
    torch.save({"state_dict": {**STATE, "extra": Hostile(mark)}}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"weights\.pth cannot be loaded safely.*run posix\.mkdir; save .* safetensors"):
        load(path)
    path.write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    with pytest.raises(UserError, match="cannot be loaded safely"):
        load(path)
    assert not mark.exists()


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(SPEC.build(0), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"cannot be loaded safely.*ConvNet; save the weights as safetensors"):
        load(tmp_path / "weights.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_file_cut_in_the_middle_is_refused(tmp_path, suffix, kept):
    path = tmp_path / f"weights.{suffix}"
    (in_safetensors if suffix == "safetensors" else as_state_dict)(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=rf"weights\.{suffix}"):
        load(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.ones(3)])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt holds no state dict; save"):
        load(tmp_path / "weights.pt")


def test_a_missing_file_says_what_may_be_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no such file; give the path of a \.safetensors"):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    broken = {key: tensor.clone() for key, tensor in STATE.items()}
    broken["features.1.bias"][2] = value
    safetensors_io.save(tmp_path / "w.safetensors", broken)
    with pytest.raises(UserError, match=r"w\.safetensors: features\.1\.bias has values that are not finite"):
        load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (NetworkSpec("convnet", (3, 8, 8), 3, width=5), r"features\.0\.weight is float32 \[4, 3, 3, 3\] where float32 \[5,"),
        (NetworkSpec("convnet", (3, 8, 8), 3, width=4, depth=3), r"it lacks features\.8\.weight, features\.8\.bias, "),
        (NetworkSpec("vgg11", (3, 8, 8), 3), r"'vgg11' for images of shape \(3, 8, 8\).*Set score\.network, width"),
    ],
)  # fmt: skip
def test_weights_of_another_network_are_refused(tmp_path, spec, message):
    safetensors_io.save(tmp_path / "w.safetensors", STATE)
    with pytest.raises(UserError, match=rf"w\.safetensors does not fit score\.network.*{message}"):
        load(tmp_path / "w.safetensors", spec)


def test_names_that_the_network_has_not_are_refused(tmp_path):
    safetensors_io.save(tmp_path / "w.safetensors", STATE | {f"extra.{i}": torch.ones(1) for i in range(5)})
    with pytest.raises(UserError, match=r"it has extra\.0, extra\.1, extra\.2 and 2 more, which the network has not"):
        load(tmp_path / "w.safetensors")


def test_quantized_weights_are_refused(tmp_path):
    safetensors_io.save(
        tmp_path / "w.safetensors", STATE | {"classifier.weight": STATE["classifier.weight"].to(torch.int8)}
    )
    with pytest.raises(UserError, match=r"classifier\.weight is int8 \[3, 16\] where float32 \[3, 16\] is expected"):
        load(tmp_path / "w.safetensors")


def test_weights_for_another_count_of_classes_are_refused(tmp_path):
    safetensors_io.save(tmp_path / "w.safetensors", WIDE_STATE)
    with pytest.raises(UserError, match=r"w\.safetensors has outputs for 5 classes, the data has 3; take weights"):
        load(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"for 5 classes, the data has 3 \(of 4 in its source\)"):
        load(tmp_path / "w.safetensors", source=[*CLASSES, "yak"])


@pytest.mark.parametrize("facts", [{}, {"class_names": json.dumps(WIDE)}])
def test_a_subset_of_the_classes_uses_its_columns_of_the_logits(tmp_path, facts):
    safetensors_io.save(tmp_path / "w.safetensors", WIDE_STATE, facts)
    chosen = ["owl", "ant", "dog"]
    weights = load(tmp_path / "w.safetensors", classes=chosen, source=WIDE)
    assert (weights.outputs, weights.classes) == (5, [3, 0, 2])
    assert [WIDE[column] for column in weights.classes] == chosen
    assert same(weights.state, WIDE_STATE)


def test_a_class_that_the_source_does_not_have_is_refused(tmp_path):
    safetensors_io.save(tmp_path / "w.safetensors", WIDE_STATE)
    with pytest.raises(UserError, match="knows no class 'emu'"):
        load(tmp_path / "w.safetensors", classes=["cat", "emu", "owl"], source=WIDE)


def test_another_order_of_classes_is_refused_by_its_first_difference(tmp_path):
    safetensors_io.save(tmp_path / "w.safetensors", STATE, {"class_names": json.dumps(["cat", "owl", "dog"])})
    with pytest.raises(
        UserError, match=r"w\.safetensors.*its class 1 is 'owl', the data's is 'dog'; list .*data\.classes"
    ):
        load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat, dog", "must be a JSON list of names, and is 'cat, dog'"),
        ("[1, 2, 3]", "must be a JSON list of names"),
        ('["cat"]', "names 1 classes in its metadata and has 3 outputs"),
    ],
)
def test_class_names_that_mean_nothing_are_refused(tmp_path, names, message):
    safetensors_io.save(tmp_path / "w.safetensors", STATE, {"class_names": names})
    with pytest.raises(UserError, match=message):
        load(tmp_path / "w.safetensors")


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


def test_any_damage_to_a_pickle_is_one_clear_error(tmp_path):
    torch.save(STATE, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 5)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        (tmp_path / "x.pt").write_bytes(raw[: chance.choice([len(raw), chance.randrange(1, len(raw))])])
        try:
            load(tmp_path / "x.pt")
        except UserError:
            refused += 1
    assert refused > 50


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
    with pytest.raises(
        UserError, match=r"1000 classes, the data has 3; .*list all of ImageNet's 1000.*data\.class_names"
    ):
        load(RESNET, spec, chosen)


def test_published_weights_name_the_network_that_they_fit(hub, resnets):
    torch.save(resnets[18].state_dict(), hub / RESNET_FILE)
    for name, side in (("resnet50_bn", 96), ("resnet18", 96), ("resnet18_bn", 64)):
        with pytest.raises(UserError, match=r"does not fit.*\(torchvision published them for torchvision:resnet18\)"):
            load(RESNET, NetworkSpec(name, (3, side, side), 1000), IDS)


def test_check_looks_at_every_file(tmp_path, make_config):
    good, bad = str(tmp_path / "good.safetensors"), str(tmp_path / "bad.safetensors")
    safetensors_io.save(tmp_path / good, STATE)
    safetensors_io.save(tmp_path / bad, WIDE_STATE)
    pretrained.check(make_config(tmp_path, score__width=4, score__weights=good), (3, 8, 8), CLASSES, CLASSES)
    pretrained.check(make_config(tmp_path), (3, 8, 8), CLASSES, CLASSES)
    with pytest.raises(UserError, match=r"bad\.safetensors has outputs for 5 classes"):
        pretrained.check(make_config(tmp_path, score__width=4, score__weights=[good, bad]), (3, 8, 8), CLASSES, CLASSES)


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
