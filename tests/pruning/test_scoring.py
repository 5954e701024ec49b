"""Proxies, scoring pass and score table: exact values, and the same bytes for any division of the work."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import FixedNetwork, as_if_compiled, write_prepared

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors.tasks import threads, train_proxies
from distill_at_scale.pruning.criteria.factory import build_criteria
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.columns import lists_to_matrix
from distill_at_scale.pruning.scoring.scorer import Scorer, score_part_path

CPU = torch.device("cpu")
SPEC = NetworkSpec("convnet", (1, 8, 8), 3, width=4)


def samples(count=40):
    """Sorted by class, as they are prepared."""
    chance = torch.Generator().manual_seed(0)
    labels = (torch.arange(count) % 3).sort().values
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=chance), labels


def trial_of(folder, trial=1, seed=0, workers=None, data=None, **section):
    """A trial on the samples; the prepared data are next to its folder."""
    section = {"epochs": 3, "batch": 16, "lr": 0.1, "width": 4, "precision": "fp32", **section}
    beside = folder.parent / f"{folder.name}-data"
    if not beside.exists():
        write_prepared(beside, *(tensor.numpy() for tensor in data or samples()))
    return proxy.ProxyTrial(PreparedDataset(beside), ScoreSection(**section), trial, seed, folder, CPU, workers)


def train(folder, progressed=lambda samples: None, saved=lambda: None, **keys):
    trial_of(folder, **keys).run(progressed, saved)


def start_from(monkeypatch, spec):
    """All proxies start from the weights of one specification."""
    monkeypatch.setattr(proxy, "network_spec", lambda config, shape, classes, kind: spec)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_trial_leaves_one_checkpoint_per_epoch(tmp_path):
    seen, finished = [], []
    train(tmp_path, progressed=seen.append, saved=lambda: finished.append(len(files(tmp_path))))
    assert sorted(files(tmp_path)) == [f"trial-01/epoch-{e:03d}.safetensors" for e in range(3)]
    assert finished == [1, 2, 3]
    assert seen == [20, 40, 60, 80, 100, 120]  # two batches per epoch of 40 samples


@pytest.mark.parametrize("section", [{}, {"momentum": 0.9, "weight_decay": 0.01}], ids=["plain", "momentum"])
@pytest.mark.parametrize("shards", [1, 2])
def test_an_epoch_on_one_batch_is_a_step_of_plain_sgd(tmp_path, monkeypatch, section, shards):
    spec = FixedNetwork(SPEC, at_once=7)
    start_from(monkeypatch, spec)
    train(tmp_path, batch=1000, shards=shards, **section)
    network, (pixels, labels) = spec.build(0), samples()
    optimizer = torch.optim.SGD(
        network.parameters(), 0.1, section.get("momentum", 0), weight_decay=section.get("weight_decay", 0)
    )
    for epoch in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network((pixels / 255 - 0.5) / 0.25), labels).backward()
        optimizer.step()
        saved = proxy.load_proxy(SPEC, proxy.checkpoint_path(tmp_path, 1, epoch), CPU).state_dict()
        assert all(torch.allclose(saved[k], v, atol=1e-4) for k, v in network.state_dict().items())


@pytest.mark.parametrize("keys", [{}, {"momentum": 0.9}, {"infobatch": 0.5}], ids=["plain", "momentum", "infobatch"])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_trial_ends_with_the_same_bytes(tmp_path, keys, stop_after):
    def stop(left=[stop_after]):  # noqa: B006
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    train(tmp_path / "whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", **keys, saved=stop)
    assert len(files(tmp_path / "parts")) == stop_after
    train(tmp_path / "parts", **keys)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_finished_trial_is_left_alone(tmp_path):
    train(tmp_path)
    before, calls = files(tmp_path), []
    train(tmp_path, progressed=calls.append, saved=lambda: calls.append("saved"))
    assert files(tmp_path) == before
    assert calls == []


def test_progress_counts_saved_epochs_and_the_notes_of_the_present_one(tmp_path):
    section = ScoreSection(trials=2, epochs=3)
    assert proxy.finished_samples(section, tmp_path, 40) == 0
    train(tmp_path, epochs=2)
    assert proxy.finished_samples(section, tmp_path, 40) == 80
    for trial, done in ((0, 13), (1, 95)):
        proxy.note_path(tmp_path, trial).parent.mkdir(exist_ok=True)
        proxy.note_path(tmp_path, trial).write_text(str(done), encoding="utf-8")
    assert proxy.finished_samples(section, tmp_path, 40) == 13 + 95


def test_the_driver_counts_samples_within_an_epoch(tmp_path, digits_run):
    class Busy:
        """An executor whose worker is in its first epoch."""

        def run(self, task, done, poll):
            proxy.note_path(tmp_path, 1).parent.mkdir()
            for seen in (7, 12):
                proxy.note_path(tmp_path, 1).write_text(str(seen), encoding="utf-8")
                assert poll()
            assert not poll()

    advanced = []
    train_proxies(Busy(), digits_run.config, digits_run.dir / "prepared", tmp_path, advanced.append)
    assert advanced == [7, 5]


def test_trials_and_seeds_have_weights_of_their_own(tmp_path):
    for name, keys in (("a", {}), ("b", {"trial": 2}), ("c", {"seed": 1}), ("d", {})):
        train(tmp_path / name, epochs=1, **keys)
    a, b, c, d = (next(iter(files(tmp_path / name).values())) for name in "abcd")
    assert len({a, b, c}) == 3
    assert a == d


def test_batch_norm_sees_a_logical_shard_as_a_whole(tmp_path, monkeypatch):
    """A network that mixes samples is not fed in parts: its first update must follow the mean over the batch."""
    bare = NetworkSpec("resnet18_bn", (1, 16, 16), 3)
    spec = FixedNetwork(bare, at_once=5)
    start_from(monkeypatch, spec)
    chance = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(256, (12, 1, 16, 16), dtype=torch.uint8, generator=chance), torch.arange(12) % 3
    train(tmp_path, trial=0, data=(pixels, labels), epochs=1, batch=12, shards=1)
    network = spec.build(0).train()
    network((pixels / 255 - 0.5) / 0.25)
    saved = proxy.load_proxy(bare, proxy.checkpoint_path(tmp_path, 0, 0), CPU)
    assert torch.allclose(saved.net.bn1.running_mean, network.net.bn1.running_mean, atol=1e-5)


class Pair:
    """One of two workers in threads: what a process group would do."""

    size = 2

    def __init__(self, rank, shared):
        self.rank, self.shared = rank, shared

    def all_gather(self, tensor):
        place = self.shared["values"]
        place[self.rank] = tensor
        self.shared["barrier"].wait()
        rows = list(place)
        self.shared["barrier"].wait()
        return rows

    def all_reduce_max(self, level):
        return max(self.all_gather(level))

    def broadcast(self, value):
        return self.all_gather(value)[0]

    def all_reduce_sum(self, tensors):
        for tensor in tensors:
            tensor.copy_(sum(self.all_gather(tensor.clone())))


def train_in_pairs(folder, **keys):
    shared = {"values": [None, None], "barrier": threading.Barrier(2, timeout=60)}
    trials = [trial_of(folder, workers=Pair(rank, shared), **keys) for rank in range(2)]
    running = [threading.Thread(target=trial.run) for trial in trials]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


@pytest.mark.parametrize("keys", [{}, {"momentum": 0.9}, {"infobatch": 0.5}], ids=["plain", "momentum", "infobatch"])
def test_two_workers_end_with_the_bytes_of_one(tmp_path, keys):
    train(tmp_path / "one", shards=4, batch=10, **keys)
    train_in_pairs(tmp_path / "two", shards=4, batch=10, **keys)
    assert len(files(tmp_path / "one")) == 3
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_threads_take_whole_shards_and_end_with_the_same_bytes(tmp_path):
    for count in (1, 2, 3):
        with threads(count):
            train(tmp_path / str(count), shards=4, batch=10, momentum=0.9)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")


def test_compiled_code_gets_batches_of_one_shape(tmp_path, monkeypatch):
    keys = {"shards": 2, "batch": 9, "epochs": 1, "momentum": 0.9}  # five and four samples
    train(tmp_path / "eager", **keys)
    seen = as_if_compiled(monkeypatch)
    train(tmp_path / "compiled", compile="always", **keys)
    assert {tuple(images.shape) for images in seen} == {(5, 1, 8, 8)}
    plain, padded = (
        proxy.load_proxy(SPEC, proxy.checkpoint_path(tmp_path / name, 1, 0), CPU).state_dict()
        for name in ("eager", "compiled")
    )
    assert all(torch.allclose(padded[name], value, atol=1e-5) for name, value in plain.items())


def test_infobatch_leaves_out_easy_samples_between_the_first_and_the_last_epoch(tmp_path):
    keys = {"epochs": 8, "shards": 1, "batch": 5, "lr": 0.01}
    trial, passed = trial_of(tmp_path / "rule", infobatch=0.9, **keys), list[tuple[int, list[int]]]()
    gradient, start = trial._batch_gradient, trial.rule.start

    def spy_on_epochs(epoch):
        passed.append((epoch, []))
        return start(epoch)

    def spy_on_batches(parts, sizes):
        passed[-1][1].extend(row for _, _, rows in parts for row in rows.tolist())
        return gradient(parts, sizes)

    trial.rule.start, trial._batch_gradient = spy_on_epochs, spy_on_batches
    trial.run()
    counts = [len(rows) for _, rows in passed]
    assert counts[0] == counts[7] == 40
    assert all(len(set(rows)) == len(rows) for _, rows in passed)
    assert max(counts[1:7]) < 35, "nine in ten of the samples below the mean loss are left out"
    assert torch.isfinite(trial.rule.losses).all()
    train(tmp_path / "all", **keys)
    first, plain = (
        proxy.load_proxy(SPEC, proxy.checkpoint_path(tmp_path / name, 1, 0), CPU).state_dict()
        for name in ("rule", "all")
    )
    assert all(torch.equal(first[name], value) for name, value in plain.items()), "the first epoch leaves nothing out"


def test_infobatch_and_parts_of_an_epoch_are_refused_together():
    with pytest.raises(ValueError, match=r"score\.infobatch chooses the samples of whole epochs; set"):
        ScoreSection(infobatch=0.5, checkpoints_per_epoch=2)


def test_two_workers_resume_together(tmp_path):
    train(tmp_path / "one", shards=2)
    train(tmp_path / "two", shards=2, epochs=1)
    train_in_pairs(tmp_path / "two", shards=2)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_number_of_workers_that_does_not_divide_the_shards_is_refused(tmp_path):
    data = write_prepared(tmp_path, *(tensor.numpy() for tensor in samples()))
    proxy.check_training(data, ScoreSection(workers=2), 0)
    with pytest.raises(UserError, match=r"score\.workers = 3 cannot share 2 logical shards evenly"):
        proxy.check_training(data, ScoreSection(workers=3), 0)


def test_the_sum_of_a_tree_does_not_depend_on_who_adds_which_half():
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = proxy.tree_sum(values)
    for workers in (2, 4):
        each = 8 // workers
        halves = [proxy.tree_sum(values[i : i + each]) for i in range(0, 8, each)]
        assert torch.equal(proxy.tree_sum(halves), expected)


def test_divergence_names_trial_epoch_and_rate_and_leaves_no_checkpoint(tmp_path):
    with pytest.raises(DistillationDiverged, match=r"trial 1, epoch \d, at score\.lr = 1e\+30"):
        train(tmp_path, lr=1e30)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(p).all() for p in proxy.load_proxy(SPEC, path, CPU).parameters())


def test_the_score_is_the_mean_cross_entropy_over_trials_and_epochs(digits_run):
    """Against each sample alone under each checkpoint."""
    run, prepared, section = digits_run.dir, PreparedDataset(digits_run.dir / "prepared"), digits_run.config.score
    scores, facts = score_table.read(run / "scores.parquet")
    assert (facts["trials"], facts["epochs"], facts["useful"]) == (2, 2, {"loss": "low"})
    pixels, labels = prepared.load("train")
    images = Normalization(tuple(prepared.mean), tuple(prepared.std)).apply(torch.from_numpy(pixels))
    spec = proxy.network_spec(section, prepared.shape, 3)
    networks = [
        proxy.load_proxy(spec, proxy.checkpoint_path(run / "proxies", t, e), CPU) for t in range(2) for e in range(2)
    ]
    values = lists_to_matrix(scores["loss_values"])
    assert scores["sample_id"].to_pylist() == prepared.index()[0]
    assert values.shape == (len(labels), 4)
    for k in range(0, len(labels), 13):
        each = [F.cross_entropy(n(images[k : k + 1]), torch.tensor([int(labels[k])])).item() for n in networks]
        assert values[k].tolist() == pytest.approx(each, abs=1e-4)
        assert scores["score"][k].as_py() == scores["loss"][k].as_py() == pytest.approx(np.mean(each), abs=1e-4)


def score(run, folder, shares, backwards=False):
    """Score the chunks of the tiny run with `shares` scorers."""
    folder.mkdir()
    chunks = PreparedDataset(run.dir / "prepared").chunks()
    with threads(1):
        for share in range(shares):
            scorer = Scorer(run.config, run.dir / "prepared", run.dir / "proxies", CPU)
            own = chunks[share::shares][:: -1 if backwards else 1]
            done = scorer.score([(chunk, score_part_path(folder, chunk)) for chunk in own])
            assert list(done) == [chunk.rows for chunk in own]
    return chunks


def test_scores_are_the_same_bytes_for_any_number_of_scorers_and_order_of_chunks(digits_run, tmp_path):
    for name, shares, backwards in (("one", 1, False), ("reversed", 1, True), ("three", 3, False)):
        chunks = score(digits_run, tmp_path / name, shares, backwards)
        pieces = [score_part_path(tmp_path / name, c) for c in chunks]
        prepared = PreparedDataset(digits_run.dir / "prepared")
        expected = [prepared.read(c, columns=["sample_id"])["sample_id"].combine_chunks() for c in chunks]
        score_table.write_scores(tmp_path / f"{name}.parquet", pieces, expected, digits_run.config)
    assert files(tmp_path / "one") == files(tmp_path / "reversed") == files(tmp_path / "three")
    expected_bytes = (digits_run.dir / "scores.parquet").read_bytes()
    assert {(tmp_path / f"{name}.parquet").read_bytes() for name in ("one", "reversed", "three")} == {expected_bytes}


def test_a_scored_chunk_is_not_scored_again(digits_run, tmp_path):
    chunks = PreparedDataset(digits_run.dir / "prepared").chunks()
    score_part_path(tmp_path, chunks[0]).write_bytes(b"finished")
    scorer = Scorer(digits_run.config, digits_run.dir / "prepared", digits_run.dir / "proxies", CPU)
    assert list(scorer.score([(chunks[0], score_part_path(tmp_path, chunks[0]))])) == [chunks[0].rows]
    assert score_part_path(tmp_path, chunks[0]).read_bytes() == b"finished"


class Confidence:
    """A plug-in criterion: the largest logit, kept where it is high, of the last epoch."""

    useful = "high"

    def observe(self, seen):
        return seen.logits.max(1).values

    def aggregate(self, values):
        return values[:, :, -1].mean(1)


def test_a_custom_criterion_gets_its_own_columns(make_run, tmp_path):
    run = make_run(
        tmp_path / "run",
        score__criterion=["loss", "test_scoring:Confidence"],
        select__criterion="test_scoring:Confidence",
    )
    run.stages("ingest", "score", "select")
    scores, facts = score_table.read(run.dir / "scores.parquet")
    assert facts["useful"] == {"loss": "low", "Confidence": "high"}
    assert scores["score"].to_pylist() == scores["loss"].to_pylist()
    values = lists_to_matrix(scores["Confidence_values"]).reshape(-1, 2, 2)
    assert scores["Confidence"].to_numpy() == pytest.approx(values[:, :, 1].mean(1))
    manifest = pq.read_table(run.dir / "manifest.parquet").to_pylist()
    for label in range(3):
        kept, dropped = (
            [r["score"] for r in manifest if r["label"] == label and r["kept"] is k] for k in (True, False)
        )
        assert min(kept) >= max(dropped)


def test_a_criterion_that_breaks_the_contract_is_refused():
    with pytest.raises(UserError, match="lacks useful, observe, aggregate"):
        build_criteria(ScoreSection(criterion="json:JSONDecoder"))
