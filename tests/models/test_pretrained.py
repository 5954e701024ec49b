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
from weight_cases import CLASSES, SPEC, load, same

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec

STATE = SPEC.build(7).state_dict()
WIDE = ["ant", *CLASSES, "yak"]  # classes of a source of which CLASSES are a subset
WIDE_STATE = NetworkSpec("convnet", (3, 8, 8), 5, width=4).build(7).state_dict()


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


def test_check_looks_at_every_file(tmp_path, make_config):
    good, bad = str(tmp_path / "good.safetensors"), str(tmp_path / "bad.safetensors")
    safetensors_io.save(tmp_path / good, STATE)
    safetensors_io.save(tmp_path / bad, WIDE_STATE)
    pretrained.check(make_config(tmp_path, score__width=4, score__weights=good), (3, 8, 8), CLASSES, CLASSES)
    pretrained.check(make_config(tmp_path), (3, 8, 8), CLASSES, CLASSES)
    with pytest.raises(UserError, match=r"bad\.safetensors has outputs for 5 classes"):
        pretrained.check(make_config(tmp_path, score__width=4, score__weights=[good, bad]), (3, 8, 8), CLASSES, CLASSES)
