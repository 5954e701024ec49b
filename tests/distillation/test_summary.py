"""The summary of an evaluation: means, deviations, accuracy per class, and differences with their intervals."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest
from scipy.stats import ttest_ind

from distill_at_scale.distillation.summary import differences, summarize


def test_the_summary_has_mean_deviation_and_count():
    def row(name, top1, seed):
        return {"set": name, "network": "convnet", "seed": seed, "top1": top1, "top5": 1.0}

    rows = [row("distilled", v, k) for k, v in enumerate((0.2, 0.4, 0.6))] + [row("full", 0.9, 0)]
    first, second = summarize(rows)
    assert (first["set"], first["network"], first["n"]) == ("distilled", "convnet", 3)
    assert (first["mean"], first["std"]) == pytest.approx((0.4, 0.2))
    assert (second["n"], second["mean"], second["std"]) == (1, 0.9, None)
    assert json.loads(json.dumps(second))["std"] is None


def test_differences_have_the_interval_of_welchs_test():
    def rows(name, values):
        return [{"set": name, "network": "convnet", "seed": k, "top1": v, "top5": 1.0} for k, v in enumerate(values)]

    def gaps(*groups):
        return differences(summarize(chain.from_iterable(groups)))

    ours, theirs = (0.5, 0.6, 0.55, 0.58), (0.4, 0.52, 0.45)
    (line,) = gaps(rows("distilled", ours), rows("unpruned", theirs))
    expected = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert (line["low"], line["high"]) == pytest.approx((expected.low, expected.high))
    assert line["mean"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert (line["against"], line["network"]) == ("unpruned", "convnet")
    (single,) = gaps(rows("distilled", (0.5,)), rows("random_real", theirs))
    assert (single["low"], single["high"]) == (None, None)


def test_the_summary_has_the_mean_of_each_class():
    row = {"set": "distilled", "network": "convnet", "top1": 0.5, "top5": 1.0, "seconds": 2.0}
    rows = [row | {"seed": 0, "per_class": [0.2, None, 1.0]}, row | {"seed": 1, "per_class": [0.4, None, 0.5]}]
    (line,) = summarize(rows)
    assert (line["per_class"], line["seconds"]) == ([0.3, None, 0.75], 2.0)
    assert "per_class" not in summarize([row | {"seed": 0}])[0]  # of an early version
