"""Renewals of the kept samples: against an independent choice, their state, read-ahead, runtime pruning, facts, refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, tiny_config
from distill_runs import LOOPS, elsewhere, lines, same, start, stop_before
from safetensors.torch import load_file

from distill_at_scale.config.fields import result_values
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.data.sampling.placement import kept_places
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.dc import JUDGE_EPOCHS
from distill_at_scale.pipeline.stages import controls

ABLE = ("dc", "dm", "dsa", "idc")


def keys_of(method: str, **keys) -> dict:
    own = {f"distill__{method}__{key}": value for key, value in SMALL[method].items()}
    own |= LOOPS if method == "dc" else {"distill__ipc": 2}
    return {**own, "distill__method": method, "distill__steps": 3, **keys}


def as_lists(kept) -> dict[int, list[int]]:
    return {label: places.tolist() for label, places in kept.items()}


def real_images(places, label: int) -> torch.Tensor:
    """All training images of a class, normalised."""
    data = PreparedDataset(places.prepared)
    pixels, labels = data.load("train")
    return normalization_of(data).apply(torch.from_numpy(pixels[labels == label]))


def values_of(places, method: str, after: int) -> dict[int, torch.Tensor]:
    """What the samples of each class are rated by after some steps without renewals, image by image."""
    run = start(elsewhere(places, "plain"), **keys_of(method))
    for i in range(after):
        run.method.step(i)
    net, (images, labels) = copy.deepcopy(run.method.net).requires_grad_(True), run.method.snapshot()
    if method == "dc":  # further epochs on the synthetic set, which is smaller than a batch
        for _ in range(JUDGE_EPOCHS - LOOPS["distill__dc__inner"] * (LOOPS["distill__dc__outer"] - 1)):
            gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= LOOPS["distill__dc__network_lr"] * gradient
    values = {}
    with torch.no_grad():
        for label in range(3):
            real = real_images(places, label)
            if method == "dm":
                features = torch.cat([net.embed(image[None]) for image in real])
                values[label] = (features - features.mean(0)).square().sum(1)
            else:
                losses = [F.cross_entropy(net(image[None]), torch.tensor([label])) for image in real]
                values[label] = torch.stack(losses)
    return values


@pytest.mark.parametrize("order", ["useful", "useless"])
@pytest.mark.parametrize("method", ["dc", "dm", "idc"])
def test_a_renewal_keeps_what_an_independent_ranking_keeps(places, method, order):
    run = start(places, **keys_of(method, select__refresh=2, select__refresh_pool=1.0, select__order=order))
    first = as_lists(run.refresh.first)
    run.run()
    expected = {}
    for label, values in values_of(places, method, after=2).items():
        order_of_values = torch.argsort(values, descending=order == "useless")
        expected[label] = sorted(order_of_values[: len(first[label])].tolist())
    assert as_lists(run.refresh.kept) == expected != first
    for label, kept in expected.items():
        stored = run.sampler.normalization.apply(run.sampler.pixels[label])
        assert torch.equal(stored, real_images(places, label)[kept])
    changed = np.mean([1 - len({*expected[c]} & {*first[c]}) / len(first[c]) for c in first])
    assert [line["renewed"] for line in lines(places) if "loss" in line] == pytest.approx([0, changed, changed])


def test_kept_samples_compete_with_a_random_part_of_the_class(places):
    run = start(places, **keys_of("dm", select__refresh=1, select__refresh_pool=0.1, distill__steps=5))
    seen, judge = [], run.method.judge

    def spy(step):
        def rate(label, parts):
            images = list(parts)
            seen.append((label, set(run.refresh.kept[label].tolist()), sum(map(len, images))))
            return judge(step)(label, images)

        return rate

    run.method.judge = spy
    run.run()
    assert len(seen) == 4 * 3
    for label, kept, rated in seen:
        drawn = -(-len(real_images(places, label)) // 10)
        assert len(kept) == len(run.refresh.first[label])
        assert len(kept) < rated <= len(kept) + drawn
    assert len({tuple(sorted(kept)) for label, kept, _ in seen if label == 0}) > 2


@pytest.mark.parametrize("method", ABLE)
def test_without_renewals_nothing_changes(places, method):
    sets = {}
    for name, keys in {"off": {}, "null": {"select__refresh": None}, "zero": {"select__refresh": 0},
                       "late": {"select__refresh": 3}, "on": {"select__refresh": 1}}.items():  # fmt: skip
        sets[name] = start(elsewhere(places, name), **keys_of(method, **keys)).run()
    assert all(same(sets["off"], sets[name]) for name in ("null", "zero", "late"))
    assert not torch.equal(sets["off"].images, sets["on"].images)
    assert not any(key.startswith("kept/") for key in load_file(elsewhere(places, "zero").state))


@pytest.mark.parametrize("hold", ["device", "shards"])
@pytest.mark.parametrize("method", ABLE)
def test_resume_equals_an_uninterrupted_run(places, method, hold):
    """Renewals after steps 2 and 4, checkpoints after steps 3 and 6; stopped at step 5, also of a run from memory."""
    keys = keys_of(method, select__refresh=2, distill__steps=6, distill__checkpoint_every=3, distill__hold=hold,
                   runtime__rule="loss", runtime__refresh=3)  # fmt: skip
    whole = start(elsewhere(places, "whole"), **keys)
    expected, parts = whole.run(), elsewhere(places, "parts")
    first = start(parts, **keys)
    stop_before(first, 5)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = start(parts, **keys)
    assert same(again.run(), expected)
    assert as_lists(again.refresh.kept) == as_lists(whole.refresh.kept) != as_lists(whole.refresh.first)
    other = {"distill__hold": "shards" if hold == "device" else "device"}
    assert same(start(elsewhere(places, "other"), **{**keys, **other}).run(), expected)


def test_a_draw_that_was_read_in_advance_is_read_again(places):
    runs = {}
    for hold in ("device", "shards"):
        keys = keys_of("dm", select__refresh=1, select__refresh_pool=1.0, distill__steps=4, distill__hold=hold)
        run = start(elsewhere(places, hold), **keys)
        started_with = run.sampler.lookahead.misses if hold == "shards" else 0
        runs[hold] = run.run()
    assert run.sampler.lookahead.misses == started_with
    assert same(runs["device"], runs["shards"])


def test_held_out_samples_are_never_rated(places, tmp_path):
    """Without those of even rank, a renewal ranks the others only; the kept samples, a fifth, are the first ones."""
    table, facts = manifest.read(places.manifest)
    ranks = table["rank"].to_numpy()
    ranks = np.where(~table["kept"].to_numpy() & (ranks % 2 == 0), -1, ranks).astype(np.int32)
    held_out = replace(places, manifest=tmp_path / "held_out.parquet")
    manifest.write(held_out.manifest, table.set_column(3, "rank", pa.array(ranks)), facts)
    run = start(held_out, **keys_of("dm", select__refresh=2, select__refresh_pool=1.0))
    ids, kept, judge = PreparedDataset(places.prepared), run.refresh.first, run.method.judge
    allowed, rated = dict[int, list[int]](), dict[int, torch.Tensor]()
    for label in kept:
        outside = {row["sample_id"] for row, rank in zip(table.to_pylist(), ranks, strict=True) if rank < 0}
        names = ids.ids("train", label).to_pylist()
        allowed[label] = [place for place, name in enumerate(names) if name not in outside]

    def spy(step):
        def rate(label, parts):
            rated[label] = torch.cat(list(parts))
            return judge(step)(label, [rated[label]])

        return rate

    run.method.judge = spy
    run.run()
    for label, inside in allowed.items():
        assert len(kept[label]) < len(inside) < len(real_images(places, label))
        assert torch.equal(rated[label], real_images(places, label)[inside])


def test_a_class_without_other_samples_is_not_rated(places):
    run = start(places, **keys_of("dm", select__refresh=1))
    run.refresh.kept = run.refresh.pool
    run.method.judge = lambda step: lambda label, parts: pytest.fail("rated")
    run.refresh.renew(0)


class ThreeClasses:
    """A prepared data set with nine samples of each of three classes, as far as checks look at it."""

    class_names = ("0", "1", "2")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {*ABLE}))
def test_other_methods_refuse(method):
    config = tiny_config("unused", distill__method=method, select__refresh=5)
    with pytest.raises(UserError, match=rf"select.refresh = 5: the method {method} .* dc, dsa, dm, idc"):
        engine.check_inputs(config, ThreeClasses(), [9, 9, 9])


def test_orders_that_need_more_than_ranks_are_refused():
    config = tiny_config("unused", select__refresh=5)
    engine.check_inputs(config, ThreeClasses(), [9, 9, 9])
    config = config.model_copy(update={"select": config.select.model_copy(update={"order": "coverage"})})
    with pytest.raises(
        UserError, match=r"cannot follow select\.order = 'coverage'; take one of useful, useless, low, high, str"
    ):
        engine.check_inputs(config, ThreeClasses(), [9, 9, 9])


def test_a_run_tells_what_was_renewed_and_shares_its_selection(make_run, digits_run, tmp_path):
    run = make_run(tmp_path / "run", run__reuse=str(digits_run.dir), select__refresh=1, select__refresh_pool=1.0)
    run.stages("ingest", "score", "select", "distill")
    records = {stage: run.pipeline.context.dir.record(stage) for stage in ("select", "distill")}
    before = {stage: digits_run.pipeline.context.dir.record(stage) for stage in ("select", "distill")}
    assert records["select"]["fingerprint"] == before["select"]["fingerprint"]
    assert records["distill"]["fingerprint"] != before["distill"]["fingerprint"]
    assert not any("refresh" in key for key in before["distill"]["config"] if key.startswith("select."))
    card = json.loads((run.dir / "synthetic" / "card.json").read_text(encoding="utf-8"))
    first = kept_places(PreparedDataset(run.dir / "prepared"), run.dir / "manifest.parquet", range(3))
    assert card["refresh"] == records["distill"]["refresh"]
    assert card["refresh"]["times"] == 2
    assert 0 < card["refresh"]["renewed_share"] <= 1
    assert sum(map(len, first.values())) == records["select"]["kept"]
    assert f"renewed 2 times; {card['refresh']['renewed_share']:.1%} of them" in run.text


def test_controls_and_ids_do_not_know_it():
    config = tiny_config("unused", select__refresh=5, select__refresh_pool=0.5)
    assert {controls.control_config(config, name).select.refresh for name in ("unpruned", "random_keep")} == {None}
    assert result_values(config.select, unused=True)["refresh"] == 5
    for off in ({}, {"select__refresh": 0}):
        values = result_values(tiny_config("unused", **off).select, unused=True)
        assert {"refresh", "refresh_pool"}.isdisjoint(values)
