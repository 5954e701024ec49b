"""What decides the result of a stage."""

import pytest

from distill_at_scale.config.load import validate
from distill_at_scale.pipeline.stages import distill, select


class NoRun:
    def content(self, stage):
        return stage

    def record(self, stage):
        return None


@pytest.mark.parametrize(
    ("method", "rule", "read"),
    [("dm", "loss", True), ("dc", "loss", False), ("dc", "ite", True), ("dm", "none", False)],
)
def test_the_tail_decides_a_distillation_only_where_its_rule_drops_both_tails(method, rule, read):
    def fingerprint(tail):
        runtime = {"rule": rule, "tail": tail}
        config = validate({"data": {"source": "digits"}, "distill": {"method": method}, "runtime": runtime})
        return distill.inputs(config, NoRun()).fingerprint

    assert (fingerprint(0.2) != fingerprint(0.5)) == read


@pytest.mark.parametrize(
    ("key", "values", "order"),
    [
        ("easiest", (0.5, 0.8), "coverage"),
        ("easiest", (0.5, 0.8), "easy_random"),
        ("strata", (5, 50), "coverage"),
        ("window", ([0.1, 0.3], [0.0, 0.5]), "window"),
    ],
)
def test_a_key_of_an_order_decides_a_selection_only_with_that_order(key, values, order):
    def fingerprints(order):
        configs = (validate({"select": {"order": order, key: value}}) for value in values)
        return {select.inputs(config, NoRun()).fingerprint for config in configs}

    assert len(fingerprints(order)) == 2
    assert fingerprints("useful") == {select.inputs(validate({}), NoRun()).fingerprint}
