"""RDED: the ranking pass, what it reads, the building of images, and the whole path."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import write_prepared
from teacher_cases import QUICK, SHAPE, make_context, make_sampler, make_teacher

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.methods.rded import RDED, best_crops
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, crop_and_flip
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Unit
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pruning.scoring.scorer import score_part_path

CLASSES, HELD, KEPT = 3, 20, 12
OPTIONS = {"crops": 3, "candidates": 8, "factor": 2}


@pytest.fixture
def ranked(tmp_path):
    """ranked(**options): context, places, chunks and candidates of a set that keeps 12 of 20 samples per class."""
    pool = make_sampler()
    pixels, labels = pool.all_samples()
    prepared = write_prepared(tmp_path / "prepared", pixels.numpy(), labels.numpy())
    ids, actual = prepared.index()
    kept = np.arange(len(ids)) % HELD % 5 < 3
    columns = [ids, actual, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), kept]
    table = pa.table([pa.array(c) for c in columns], names=manifest.SCHEMA.names).cast(manifest.SCHEMA)
    manifest.write(tmp_path / "manifest.parquet", table, {})

    def prepare(**options):
        context = make_context(tmp_path / "networks", steps=options.pop("steps", 1), **OPTIONS | options)
        if not (context.networks / TEACHER).exists():
            make_teacher(context)
        places = DistillPaths(
            tmp_path / "prepared", tmp_path / "manifest.parquet", tmp_path, tmp_path / "l", context.networks
        )
        pieces = patch_ranking.parts_folder(places.networks, context.config)
        pieces.mkdir(parents=True, exist_ok=True)
        candidates = patch_ranking.draw_candidates(places.manifest, context.config, pieces)
        return context, places, prepared.chunks(), candidates

    return prepare


def table_of(context, places, chunks, candidates) -> pa.Table:
    tasks.rank_patches(LocalExecutor(), context.config, places, chunks, lambda n: None)
    pieces = patch_ranking.parts_folder(places.networks, context.config)
    target = patch_ranking.table_path(places.networks, context.config)
    patch_ranking.merge(
        [score_part_path(pieces, c) for c in chunks], candidates, context.config.distill.rded.crops, target
    )
    return pq.read_table(target)


def kept_pool(places, hold="auto"):
    from distill_at_scale.data.sampling.class_sampler import ClassSampler

    return ClassSampler.load(
        PreparedDataset(places.prepared), places.manifest, range(CLASSES), 0, torch.device("cpu"), hold
    )


def test_every_crop_of_every_candidate_is_ranked_by_the_teachers_loss(ranked):
    context, places, chunks, candidates = ranked()
    table = table_of(context, places, chunks, candidates)
    assert table.num_rows == CLASSES * 8 * 3
    teacher, pool = Teacher.load(places.networks / TEACHER, torch.device("cpu")), kept_pool(places)
    for row in table.to_pylist()[::7]:
        image = pool.normalization.apply(pool.pixels[row["label"]][row["row"]][None])
        box = patch_ranking.crop_boxes(context.seed, row["sample_id"], context.config.distill.rded)[row["crop"]]
        loss = F.cross_entropy(teacher(crop_and_flip(image, box[None])), torch.tensor([row["label"]]))
        assert row["loss"] == pytest.approx(float(loss), rel=1e-3, abs=1e-5)


def test_candidates_are_drawn_from_the_kept_samples_by_the_seed(ranked):
    kept = set(manifest.kept(ranked()[1].manifest).to_pylist())
    first, more = ranked()[3], ranked(candidates=50)[3]
    assert first["label"].to_pylist() == [c for c in range(CLASSES) for _ in range(8)]
    assert set(first["sample_id"].to_pylist()) < set(more["sample_id"].to_pylist()) == kept
    assert first["sample_id"].to_pylist() != more["sample_id"].to_pylist()[:8]


def test_only_candidates_are_decoded(ranked, monkeypatch):
    context, places, chunks, candidates = ranked()
    seen, decode = [], PreparedDataset.pixels
    monkeypatch.setattr(
        PreparedDataset,
        "pixels",
        lambda self, table, *a: (seen.extend(table["sample_id"].to_pylist()), decode(self, table, *a))[1],
    )
    table_of(context, places, chunks, candidates)
    assert sorted(seen) == sorted(candidates["sample_id"].to_pylist())


def test_row_groups_without_a_candidate_are_not_read(ranked, monkeypatch):
    context, places, chunks, candidates = ranked(candidates=1)
    read, parts_read = PreparedDataset.read, []

    def spy(self, part, split="train", columns=None):
        if columns is None:
            parts_read.append(part)
        return read(self, part, split, columns)

    monkeypatch.setattr(PreparedDataset, "read", spy)
    table_of(context, places, chunks, candidates)
    assert len(parts_read) == CLASSES


def test_an_interrupted_pass_resumes_to_the_same_bytes(ranked, monkeypatch):
    context, places, chunks, candidates = ranked()
    assert len(chunks) > 2
    target = patch_ranking.table_path(places.networks, context.config)
    table_of(context, places, chunks, candidates)
    expected = target.read_bytes()
    pieces = [score_part_path(patch_ranking.parts_folder(places.networks, context.config), chunk) for chunk in chunks]
    before = pieces[0].stat().st_mtime_ns
    for piece in pieces[1:]:
        piece.unlink()
    ranker = patch_ranking.PatchRanker(context.config, places.prepared, places.networks, torch.device("cpu"))
    assert list(ranker.rank([(chunks[2], pieces[2])])) == [chunks[2].rows]  # another actor, in another order
    table_of(context, places, chunks, candidates)
    assert target.read_bytes() == expected
    assert pieces[0].stat().st_mtime_ns == before


def test_actors_of_a_cluster_make_the_same_bytes_for_any_split_of_the_work(ranked):
    """The actor's own code without a cluster: units alternate between two actors, one of which is replaced."""
    from distill_at_scale.cluster.actor_pool import PoolActor
    from distill_at_scale.cluster.session import pack

    context, places, chunks, candidates = ranked()
    table_of(context, places, chunks, candidates)
    target, pieces = (
        make(places.networks, context.config) for make in (patch_ranking.table_path, patch_ranking.parts_folder)
    )
    expected = target.read_bytes()
    units = [Unit(chunk, (score_part_path(pieces, chunk),), size=chunk.rows) for chunk in chunks]
    for chunk in chunks:
        score_part_path(pieces, chunk).unlink()
    paths = {"prepared": str(places.prepared), "networks": str(places.networks)}

    def started() -> PoolActor:
        actor = PoolActor([])
        actor.begin((pack(context.config), tasks.RankPatches, paths, 1))
        return actor

    actors = [started(), started()]
    for number, unit in enumerate(reversed(units)):
        if number == 2:
            actors[0] = started()
        results, event = actors[number % 2].run([unit])
        assert results == [{"samples": unit.size}]
        assert event.values["samples"] == unit.size
    patch_ranking.merge([score_part_path(pieces, chunk) for chunk in chunks], candidates, 3, target)
    assert target.read_bytes() == expected


def test_part_files_of_other_candidates_are_refused(ranked):
    context, places, chunks, candidates = ranked()
    with pytest.raises(UserError, match="not those of the candidates"):
        table_of(context, places, chunks, candidates.slice(1))


def test_a_teacher_that_gives_no_finite_loss_is_named(ranked):
    context, places, chunks, candidates = ranked()
    teacher = Teacher.load(places.networks / TEACHER, torch.device("cpu"))
    teacher.network.classifier.bias.data[:] = float("nan")
    teacher.save(places.networks / TEACHER)
    with pytest.raises(UserError, match=r"the teacher's loss for '000/.*' is not finite"):
        table_of(context, places, chunks, candidates)


def test_other_options_are_other_tables(ranked):
    base, *others = [
        patch_ranking.table_path(Path("n"), ranked(**o)[0].config) for o in ({}, {"crops": 4}, {"crop_scale": 0.9})
    ]
    assert len({base, *others}) == 3
    assert patch_ranking.table_path(Path("n"), ranked(label_epochs=9, factor=1)[0].config) == base


def test_the_best_crop_of_every_image_comes_first_then_their_second_best():
    losses = np.array([[3.0, 1.0], [0.5, 9.0], [2.0, 2.0]])
    images, crops = best_crops(losses, 8)
    assert images.tolist() == [1, 0, 2, 2, 0, 1, 1, 0]
    assert crops.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def built(ranked, **options):
    context, places, chunks, candidates = ranked(**options)
    table = table_of(context, places, chunks, candidates)
    method = RDED(context)
    method.prepare(kept_pool(places))
    return method, table


def test_images_are_tiled_of_the_most_realistic_patches(ranked):
    method, table = built(ranked, crop_scale=1.0, crops=1)
    assert method.step(0)["classes"] == CLASSES
    images, labels = method.snapshot()
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    mine = table.filter(pc.equal(table["label"], 1)).sort_by([("loss", "ascending"), ("row", "ascending")])
    first = method.real.normalization.apply(method.real.pixels[1][mine["row"][0].as_py()][None])
    small = F.interpolate(first, size=(4, 4), mode="bilinear", antialias=True)
    assert torch.allclose(images[2, :, :4, :4], small[0], atol=1e-4)
    assert not torch.allclose(images[2, :, 4:, 4:], small[0], atol=1e-2)


def test_samples_in_shards_give_the_same_set(ranked):
    method, _ = built(ranked)
    method.step(0)
    held = method.snapshot()[0]
    method.prepare(kept_pool(ranked()[1], "shards"))
    method.step(0)
    assert torch.equal(method.snapshot()[0], held)


def test_a_damaged_table_is_named(ranked):
    method, _ = built(ranked)
    method.path.write_bytes(method.path.read_bytes()[:100])
    for use in (lambda: method.step(0), lambda: patch_ranking.images_per_class(method.path, 3)):
        with pytest.raises(
            UserError, match=r"patches-.*parquet cannot be read .*; it was renamed to patches-.*damaged"
        ):
            use()


def test_with_a_factor_of_one_an_image_is_one_crop(ranked):
    method, table = built(ranked, factor=1, crop_scale=1.0, crops=1)
    method.step(0)
    mine = table.filter(pc.equal(table["label"], 0)).sort_by([("loss", "ascending"), ("row", "ascending")])
    real = method.real.normalization.apply(method.real.pixels[0][mine["row"][0].as_py()])
    assert torch.allclose(method.snapshot()[0][0], real, atol=1e-4)


def test_several_steps_build_the_same_set_and_a_state_resumes(ranked):
    together, _ = built(ranked)
    together.step(0)
    divided, _ = built(ranked, steps=3)
    assert divided.step(0)["classes"] == 1
    resumed, _ = built(ranked, steps=3)
    resumed.load_state_dict(divided.state_dict())
    for i in (1, 2):
        resumed.step(i)
    assert torch.equal(resumed.snapshot()[0], together.snapshot()[0])


def test_a_class_with_few_images_uses_further_crops_of_them_and_says_so(ranked):
    method, _ = built(ranked, candidates=5)
    method.step(0)
    more = method.finalize(*method.snapshot())
    assert more.card["patches_of_reused_images"] == {"zero": 3, "one": 3, "two": 3}  # eight wanted of five
    enough, _ = built(ranked, candidates=8)
    assert enough.finalize(*enough.snapshot()).card["patches_of_reused_images"] == {}


@pytest.mark.parametrize("candidates", [5, 8])  # with five, further crops of the same images are taken
def test_samples_read_from_shards_give_the_same_images(ranked, tmp_path, candidates):
    from distill_at_scale.data.sampling.class_sampler import ClassSampler

    method, _ = built(ranked, candidates=candidates)
    method.step(0)
    images, _ = method.snapshot()
    prepared, device = PreparedDataset(tmp_path / "prepared"), torch.device("cpu")
    method.prepare(ClassSampler.load(prepared, tmp_path / "manifest.parquet", range(CLASSES), 0, device, hold="shards"))
    method.step(0)
    assert torch.equal(method.snapshot()[0], images)


RUN = {"distill__method": "rded", "distill__rded": QUICK | OPTIONS, "distill__ipc": 2, "evaluate__epochs": 2,
        "evaluate__seeds": 1}  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(make_run, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("rded") / "run", **RUN, evaluate__bounds=["kept"], evaluate__bound_epochs=1)
    return run.stages("ingest", "score", "select", "distill", "evaluate")


def test_the_whole_path_ends_in_a_set_that_loads_and_trains(whole_run):
    synthetic = synthetic_set.load(whole_run.dir)
    assert synthetic.images.shape == (6, *SHAPE)
    assert synthetic.extras == {}
    assert synthetic.protocol.labels == "views"
    assert synthetic.card["soft_label_bytes"] == 2 * 6 * 3 * 2
    assert sorted(p.name for p in (whole_run.dir / "synthetic").iterdir()) == [
        "card.json", "labels", "preview.png", "snapshots.safetensors", "synthetic.safetensors",
        "teacher.safetensors"]  # fmt: skip
    assert synthetic.training_set().views.epochs == 2
    rows = json.loads((whole_run.dir / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [row["set"] for row in rows] == ["distilled", "random_real", "kept"]


def test_the_ranking_leaves_one_table_next_to_the_teacher(whole_run):
    [folder] = (whole_run.dir / "networks").iterdir()
    assert sorted(p.suffix for p in folder.iterdir()) == [".parquet", ".safetensors"]
    assert whole_run.text.count("rank:") >= 1


def test_a_second_distillation_ranks_and_trains_nothing_again(whole_run, make_run):
    os.remove(whole_run.dir / "stages" / "distill.json")
    before = (whole_run.dir / "synthetic" / "synthetic.safetensors").read_bytes()
    again = make_run(whole_run.dir, **RUN, evaluate__bounds=["kept"], evaluate__bound_epochs=1).stages("distill")
    assert "rank:" not in again.text
    assert "1 network:" not in again.text
    assert (whole_run.dir / "synthetic" / "synthetic.safetensors").read_bytes() == before


def test_a_set_without_its_labels_still_shows_its_images(whole_run, tmp_path):
    synthetic = synthetic_set.load(whole_run.dir)
    synthetic.save(tmp_path / "copy")  # takes the labels along
    copy = synthetic_set.load(tmp_path / "copy")
    views = [one.training_set().views for one in (copy, synthetic)]
    assert views[0].file(1).read_bytes() == views[1].file(1).read_bytes()
    os.remove(views[0].file(1))
    assert torch.equal(synthetic_set.load(tmp_path / "copy").images, synthetic.images)
    with pytest.raises(UserError, match=r"lacks the labels of its views: .*epoch-00001\.safetensors cannot be read"):
        synthetic_set.load(tmp_path / "copy").training_set()


def test_the_random_control_is_labelled_by_the_same_teacher_under_the_same_protocol(whole_run):
    from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator

    folders = [whole_run.dir / name for name in ("prepared", "synthetic", "manifest.parquet")]
    evaluator = Evaluator(whole_run.config, *folders, torch.device("cpu"))
    control, synthetic = (
        evaluator._training_set(EvaluationJob(name, "convnet", 0), evaluator.synthetic)
        for name in ("random_real", "distilled")
    )
    assert (control.views.epochs, control.views.temperature) == (synthetic.views.epochs, 20.0)
    assert asdict(control.views.teacher.facts) == asdict(evaluator.synthetic.teacher(torch.device("cpu")).facts)
    for batch in evaluator.synthetic.protocol.plan.batches(
        0, 6
    ):  # asked about the set itself, it gives the set's labels
        views = batch.apply(synthetic.images[batch.rows])
        assert torch.allclose(control.views.logits(0, batch, views), synthetic.views.logits(0, batch, views), atol=2e-2)
    kept = EvaluationJob("kept", "convnet", 0)
    assert evaluator._training_set(kept, evaluator.synthetic).views is None
    assert evaluator._protocol(kept, evaluator.synthetic).labels == "hard"


def test_pretrained_weights_are_identified_by_content_not_path(make_run, tmp_path):
    weights, moved = (NetworkSpec("convnet_bn", SHAPE, CLASSES, 8).build(seed).state_dict() for seed in (1, 2))
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    safetensors_io.save(first, weights)
    run = make_run(tmp_path / "run", **RUN | {"distill__rded": QUICK | OPTIONS | {"teacher_weights": str(first)}})
    run.stages("ingest", "score", "select", "distill")
    before = run.dir.joinpath("stages", "distill.json").read_bytes()
    assert str(tmp_path) not in (run.dir / "synthetic" / "card.json").read_text(encoding="utf-8")
    first.rename(second)
    there = RUN | {"distill__rded": QUICK | OPTIONS | {"teacher_weights": str(second)}}
    make_run(tmp_path / "run", **there).stages("distill")
    assert run.dir.joinpath("stages", "distill.json").read_bytes() == before
    safetensors_io.save(second, moved)
    with pytest.raises(UserError, match=r"teacher weights: .* -> "):
        make_run(tmp_path / "run", **there).stages("distill")
    second.unlink()
    make_run(tmp_path / "run", **there).stages("distill")  # done already: the weights are not needed


def test_a_set_with_the_labels_of_another_says_so(whole_run, tmp_path):
    synthetic = synthetic_set.load(whole_run.dir)
    synthetic.save(tmp_path / "copy")
    path = tmp_path / "copy" / "labels" / "epoch-00000.safetensors"
    held = safetensors_io.load(path)
    for wrong in ({"other": torch.zeros(2)}, {key: value[:-1] for key, value in held.items()}):
        safetensors_io.save(path, wrong)
        with pytest.raises(UserError, match="copy lacks the labels of its views"):
            synthetic_set.load(tmp_path / "copy").training_set()
    with pytest.raises(UserError, match="lacks the labels of its views"):
        synthetic_set.SyntheticSet(synthetic.images, synthetic.labels, synthetic.card).training_set()
