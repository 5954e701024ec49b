"""Data that are not images: the source, its rejections, and signals distilled from end to end."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from distill_at_scale.cli import main
from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.images import PLOT, to_pixels
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.ingest import sample_types
from distill_at_scale.data.ingest.sample_types import TensorDecoder
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization, normalization_of
from distill_at_scale.data.sources.tensors import Tensors
from distill_at_scale.distillation import export as exports
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.models.spec import MemoryFormat, NetworkSpec

UNCUT = {"augment": "none", "student_augment": "none", "factor": 1, "network_cutmix": 0.0, "student_cutmix": 0.0}
SIGNALS = ("saw", "sine", "square")


class Waves(nn.Module):
    """A small 1-D ConvNet, as a user would write it."""

    def __init__(self, spec: NetworkSpec):
        super().__init__()
        width = spec.width
        self.body = nn.Sequential(
            nn.Conv1d(spec.shape[0], width, 7, padding=3), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool1d(2),
            nn.Conv1d(width, width, 5, padding=2), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool1d(4), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(width * (spec.shape[-1] // 8), spec.classes)

    def embed(self, signals):
        return self.body(signals)

    def forward(self, signals):
        return self.head(self.embed(signals))


def signals(n: int, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, 1, 64] at almost one phase, and labels [n]."""
    chance = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    turns = np.linspace(0, 2, 64)[None] + chance.uniform(0, 0.15, (n, 1))
    sine = np.sin(2 * np.pi * turns)
    waves = np.choose(labels[:, None], [2 * (turns % 1) - 1, sine, np.sign(sine)])
    return (5 + 3 * (waves + noise * chance.normal(size=waves.shape)))[:, None].astype(np.float32), labels


def write(folder, values, labels, split="train", kind=None):
    folder.mkdir(exist_ok=True)
    column = pa.array([v.tolist() if isinstance(v, np.ndarray) else v for v in values], kind)
    pq.write_table(pa.table({"values": column, "label": labels}), folder / f"{split}-0.parquet", row_group_size=50)


def source_of(folder, **keys) -> Tensors:
    return Tensors(DataSection(source="tensors", path=str(folder), **keys))


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waves") / "data"
    for split, n, seed in (("train", 360, 0), ("test", 240, 1)):
        values, labels = signals(n, seed, 3.0)
        write(folder, values, [SIGNALS[label] for label in labels], split)
    return folder


def config_of(folder, data, **distill):
    return {
        "run": {"dir": str(folder)},
        "data": {"source": "tensors", "path": str(data), "chunk": 100},
        "score": {"trials": 1, "epochs": 1, "network": "test_tensors:Waves", "width": 16, "batch": 64},
        "select": {"keep": 0.8},
        "distill": {"network": "test_tensors:Waves", "width": 16, "ipc": 1, **distill},
        "evaluate": {"networks": ["test_tensors:Waves"], "seeds": 3, "epochs": 60},
        "cluster": {"address": "none"},
    }


def run(path, values, *overrides) -> int:
    path.write_text(json.dumps(values), encoding="utf-8")
    return main(["run", str(path), *overrides])


@pytest.fixture(scope="module")
def finished(waves, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    distill = {
        "method": "dm",
        "steps": 150,
        "dm": {"augment": "none", "init": "noise", "image_lr": 5.0, "real_batch": 64},
    }
    assert run(folder / "c.yaml", config_of(folder / "run", waves, **distill)) == 0
    return folder / "run"


def test_signals_are_distilled_and_beat_random_ones(finished):
    summary = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))["summary"]
    means = {row["set"]: row["mean"] for row in summary}
    assert means["distilled"] > means["random_real"] + 0.03
    assert means["distilled"] > 0.5


def test_prepared_tensors_are_the_given_numbers(finished, waves):
    prepared = PreparedDataset(finished / "prepared")
    assert (prepared.kind, prepared.shape, prepared.dtype) == ("tensors", (1, 64), np.float32)
    values, labels = prepared.load("train")
    expected, _ = signals(360, 0, 3.0)
    assert np.array_equal(np.sort(values.reshape(360, -1), 0), np.sort(expected.reshape(360, -1), 0))
    assert [prepared.class_names[c] for c in labels[[0, -1]]] == ["saw", "square"]
    schema = pq.read_schema(next((finished / "prepared" / "train").glob("*.parquet")))
    assert schema.field("values").metadata == {b"shape": b"[1, 64]", b"dtype": b"float32"}
    assert schema.field("values").type == pa.binary(256)


def test_tensors_are_normalised_by_their_first_axis(finished):
    prepared = PreparedDataset(finished / "prepared")
    normal = normalization_of(prepared).apply(torch.from_numpy(prepared.load("train")[0]))
    assert abs(float(normal.mean())) < 1e-4
    assert float(normal.std(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4), (2, 3, 4, 5)])
def test_normalising_tensors_of_any_shape_can_be_inverted(shape):
    channels = shape[0] if len(shape) > 1 else 1
    norm = Normalization(tuple(range(channels)), tuple(1.0 + c for c in range(channels)), 1, len(shape) - 1)
    values = torch.randn(6, *shape)
    normal = norm.apply(values)
    if len(shape) > 1:
        assert torch.allclose(normal[:, 1], (values[:, 1] - 1) / 2)
    assert torch.allclose(norm.stored(normal), values, atol=1e-5)
    assert Normalization.of_card(json.loads(json.dumps(norm.card()))) == norm


def test_a_set_of_signals_is_self_contained(finished):
    synthetic = synthetic_set.load(finished)
    assert synthetic.kind == "tensors"
    assert "x - mean" in synthetic.card["normalization"]["meaning"]
    values = synthetic.values()
    assert values.dtype == torch.float32
    prepared = PreparedDataset(finished / "prepared")
    assert torch.allclose(values, synthetic.images * prepared.std[0] + prepared.mean[0])
    assert prepared.mean[0] == pytest.approx(5, abs=0.5)  # the data's own scale
    with pytest.raises(UserError, match=r"no pixels; values\(\)"):
        synthetic.pixels()


def test_exports_of_signals(finished, tmp_path):
    synthetic = synthetic_set.load(finished)
    with pytest.raises(UserError, match="export_parquet or export_pt"):
        synthetic.export_imagefolder(tmp_path / "folder")
    synthetic.export_parquet(tmp_path / "train-0.parquet")
    again = source_of(tmp_path)
    raws = again.read(again.listing("train"))
    assert again.class_names == list(SIGNALS)
    assert np.array_equal(np.stack(raws), synthetic.values().numpy())
    synthetic.export_pt(tmp_path / "set.pt")
    assert torch.equal(torch.load(tmp_path / "set.pt", weights_only=True)["images"], synthetic.images)


def test_the_report_draws_signals(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "synthetic signals" in page
    assert "1 × 64 values each" in page
    with Image.open(finished / "synthetic" / "preview.png") as preview:
        assert len(preview.convert("L").getcolors(256)) > 2


@pytest.mark.parametrize(
    ("method", "section"),
    [("dc", {"outer": 1}), ("dm", {"augment": "none"}), ("idc", {"inner": 2, "network_samples": 30, **UNCUT})],
)
def test_the_built_in_mlp_distils_signals(waves, tmp_path, method, section):
    values = config_of(tmp_path / "run", waves, method=method, steps=2, **{method: section})
    values["score"]["network"] = values["distill"]["network"] = "mlp"
    values["evaluate"] = {"networks": ["mlp"], "seeds": 1, "epochs": 2}
    assert run(tmp_path / "c.yaml", values) == 0


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("dm", "distill.dm.augment=none"),
        (
            "idc",
            "distill.idc.augment=none distill.idc.student_augment=none distill.idc.factor=1 "
            "distill.idc.network_cutmix=0.0 distill.idc.student_cutmix=0.0",
        ),
        ("mtt", "distill.mtt.augment=none distill.mtt.expert_augment=none"),
        ("rded", "crops images"),
        ("pca", "crops images"),
        ("coreset", "distill.coreset.student_augment=none"),
    ],
)
def test_what_methods_do_to_images_is_refused_with_all_keys(waves, method, wanted):
    values = configuration.validate({"data": {"source": "tensors", "path": str(waves)}, "distill": {"method": method}})
    with pytest.raises(UserError, match=wanted.replace(".", r"\.")):
        sample_types.check(values)


@pytest.mark.parametrize("name", ["convnet", "convnet3d", "resnet18"])
def test_networks_of_images_refuse_signals_with_advice(name):
    with pytest.raises(UserError, match="take mlp, or a network of your own"):
        NetworkSpec(name, (1, 64), 3, 8, kind="tensors").build(0)


def test_four_axes_are_not_taken_for_a_clip():
    spec = NetworkSpec("mlp", (2, 3, 4, 5), 3, 8, kind="tensors")
    assert not spec.clips
    samples = torch.randn(2, 2, 3, 4, 5)
    assert MemoryFormat(spec, True).images(samples) is samples
    assert spec.build(0)(samples).shape == (2, 3)
    assert spec.microbatch(torch.device("cpu")) >= 4


RAMP = np.arange(24)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.float64())),
        pa.list_(pa.list_(pa.float32(), 4), 3),
        pa.large_list(pa.list_(pa.int16())),
        pa.list_(pa.list_(pa.uint8(), 4)),
    ],
)
def test_lists_of_all_kinds_are_read(tmp_path, kind):
    write(tmp_path / "d", RAMP.reshape(2, 3, 4), [0, 1], kind=kind)
    source = source_of(tmp_path / "d")
    assert source.shape == (3, 4)
    assert np.array_equal(np.stack(source.read(source.listing("train"))), RAMP.reshape(2, 3, 4))


def test_arrow_tensors_are_read(tmp_path):
    (tmp_path / "d").mkdir()
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(RAMP.reshape(2, 3, 4).astype(np.float32))
    pq.write_table(pa.table({"x": column, "label": [0, 1]}), tmp_path / "d" / "train.parquet")
    source = source_of(tmp_path / "d", value_column="x")
    assert source.shape == (3, 4)
    assert np.array_equal(np.stack(source.read(source.listing("train"))), RAMP.reshape(2, 3, 4))


def test_broken_rows_are_rejected_with_their_reasons(tmp_path):
    good = [[1.0, 2.0], [3.0, 4.0]]
    values = [good, None, [[1.0], [2.0, 3.0]], [[1.0, float("nan")], [0.0, 0.0]], [[1.0, 2.0]], [[1e39, 0.0], [0.0, 0.0]],
              [[1.0, None], [0.0, 0.0]], good]  # fmt: skip
    write(tmp_path / "d", values, [0] * 7 + [1])
    source, decode = source_of(tmp_path / "d"), TensorDecoder((2, 2))
    reasons = []
    for raw in source.read(source.listing("train")):
        try:
            reasons.append(decode(raw).dtype.name)
        except SampleRejected as error:
            reasons.append(str(error))
    ragged = "no array of numbers: missing, or its lists differ in length or lack numbers; correct it"
    finite = "1 of its values are not finite in 32 bits; correct them"
    shape = "its shape is [1, 2], that of all others [2, 2]"
    assert reasons == ["float32", ragged, ragged, finite, shape, finite, ragged, "float32"]


def test_a_column_without_numbers_is_named(tmp_path):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"values": ["a"], "label": [0]}), tmp_path / "d" / "train.parquet")
    with pytest.raises(UserError, match=r"'values' must be lists of numbers.*set data\.value_column"):
        source_of(tmp_path / "d").listing("train")


def test_drawing_is_for_what_has_no_pixels():
    pixels = np.zeros((2, 3, 8, 8), np.uint8)
    assert to_pixels(pixels) is pixels
    lines = np.stack([np.linspace(0, 1, 50), np.linspace(1, 0, 50)]).astype(np.float32)
    plots = to_pixels(lines)
    assert plots.shape == (2, 3, PLOT, PLOT)
    up = (plots[0] != 255).any(0)
    assert up[-12:, :12].any()
    assert not up[:12, :12].any()
    fields = np.random.default_rng(0).random((2, 4, 5, 600)).astype(np.float32)
    assert to_pixels(fields).shape == (2, 1, 20, 200)
    assert to_pixels(np.full((2, 10, 10, 10), 3.0, np.float32)).max() == 0


def test_exported_lists_have_the_samples_shape(tmp_path):
    values = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    normalization = {"mean": [0.0] * 3, "std": [1.0] * 3, "scale": 1, "inner": 2}
    card = {"kind": "tensors", "class_names": ["a", "b"], "normalization": normalization}
    synthetic = SyntheticSet(values, torch.tensor([0, 1]), card)
    exports.export_parquet(synthetic, tmp_path / "t.parquet")
    assert np.array_equal(np.array(pq.read_table(tmp_path / "t.parquet")["values"].to_pylist()), values.numpy())
