"""Configurations that are refused before training."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.validate import check_names, check_networks, check_weights


def test_networks_that_fit_pass(tmp_path, make_config, digits_run):
    check_networks(make_config(tmp_path), PreparedDataset(digits_run.dir / "prepared"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distill__depth": 8}, "too deep for 8 x 8 pixels"),
        ({"evaluate__networks": ["resnet18"]}, "resnet18 needs at least 16 x 16 pixels"),
        (
            {"distill__network": "collections:OrderedDict"},
            r"distill\.network = 'collections:OrderedDict' cannot take images",
        ),
    ],
)
def test_networks_that_do_not_fit_the_data_are_refused(tmp_path, make_config, digits_run, keys, message):
    with pytest.raises(UserError, match=message):
        check_networks(make_config(tmp_path, **keys), PreparedDataset(digits_run.dir / "prepared"))


def test_batch_norm_is_refused_for_matching(tmp_path, make_run):
    run = make_run(tmp_path / "run", data__size=32, distill__network="resnet18_bn", distill__method="dm")
    with pytest.raises(UserError, match="has batch norm"):
        run.stages("ingest")


def test_torchvisions_classifiers_may_be_named(tmp_path, make_config):
    check_names(make_config(tmp_path, score__network="torchvision:resnet18", evaluate__networks=["torchvision:vgg11"]))
    for key in ("score__network", "distill__network"):
        with pytest.raises(UserError, match=rf"{key.replace('__', '.')} = 'torchvision:resnet8' is no classifier"):
            check_names(make_config(tmp_path, **{key: "torchvision:resnet8"}))


def test_given_weights_are_loaded_before_the_run(tmp_path, make_config, digits_run):
    """Of three digits, out of a source of ten."""
    prepared = PreparedDataset(digits_run.dir / "prepared")
    files = {count: str(tmp_path / f"{count}.safetensors") for count in (3, 4, 10)}
    for count, file in files.items():
        safetensors_io.save(
            tmp_path / file, NetworkSpec("convnet", prepared.shape, count, width=8).build(0).state_dict()
        )
    prepared.meta["source_class_names"] = [str(digit) for digit in range(10)]
    check_weights(make_config(tmp_path, score__weights=[files[3], files[10]]), prepared)
    with pytest.raises(UserError, match=r"4\.safetensors has outputs for 4 classes, the data has 3 \(of 10"):
        check_weights(make_config(tmp_path, score__weights=[files[3], files[4]]), prepared)
    del prepared.meta["source_class_names"]  # as in data prepared before it was recorded
    with pytest.raises(UserError, match=r"10\.safetensors has outputs for 10 classes, the data has 3;"):
        check_weights(make_config(tmp_path, score__weights=files[10]), prepared)


def test_videos_need_a_number_of_frames_and_images_have_none(tmp_path, make_config):
    with pytest.raises(UserError, match=r"kinetics holds videos; set data\.frames"):
        check_names(make_config(tmp_path, data__source="kinetics"))
    with pytest.raises(UserError, match=r"imagefolder holds images, so data\.frames = 8 has no meaning"):
        check_names(make_config(tmp_path, data__source="imagefolder", data__frames=8))
    with pytest.raises(UserError, match=r"data\.seek = fast needs PyAV"):
        check_names(
            make_config(tmp_path, data__source="kinetics", data__frames=8, data__decoder="decord", data__seek="fast")
        )


def test_more_images_than_samples_are_seen_before_anything_is_decoded(tmp_path, make_run):
    run = make_run(tmp_path / "run", distill__method="dm", distill__ipc=1000)
    with pytest.raises(UserError, match=r"the class '0' has \d+ samples, fewer than distill\.ipc = 1000"):
        run.pipeline.validate()
    assert not (run.dir / "validation.parquet").exists()


def test_validate_lists_what_is_broken_and_changes_nothing(make_run, tmp_path):
    for k in range(4):
        for name in ("a", "b"):
            path = tmp_path / "data" / "train" / name / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 9 * k, np.uint8)).save(path)
    (tmp_path / "data" / "train" / "a" / "0.png").write_bytes(b"broken")
    (tmp_path / "data" / "train" / "b" / "1.png").unlink()
    (tmp_path / "data" / "train" / "b" / "1.png").symlink_to(tmp_path / "nowhere.png")
    keys = {
        "data__source": "imagefolder",
        "data__path": str(tmp_path / "data"),
        "data__classes": None,
        "data__holdout": None,
    }
    run = make_run(tmp_path / "run", **keys)
    assert run.pipeline.validate() == 2
    rows = pq.read_table(tmp_path / "run" / "validation.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == ["train/a/0.png", "train/b/1.png"]
    assert "2 of 8 samples cannot be used" in run.text
    assert not (tmp_path / "run" / "prepared").exists()
    for k in range(4):
        (tmp_path / "data" / "train" / "a" / f"{k}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="no training sample of the class 'a' can be used"):
        make_run(tmp_path / "run", **keys).pipeline.validate()
