"""What decides the result of a stage."""

import pytest

from distill_at_scale.config.load import validate
from distill_at_scale.pipeline.stages import distill


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
