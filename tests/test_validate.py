"""What is refused before anything is trained."""

from __future__ import annotations

import pytest

from distill_at_scale.data.shards import Prepared
from distill_at_scale.errors import UserError
from distill_at_scale.validate import check_networks


def test_networks_that_fit_pass(tmp_path, make_config, digits_run):
    check_networks(make_config(tmp_path), Prepared(digits_run.dir / "prepared"))


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
        check_networks(make_config(tmp_path, **keys), Prepared(digits_run.dir / "prepared"))


def test_batch_norm_is_refused_for_matching(tmp_path, make_run):
    run = make_run(tmp_path / "run", data__size=32, distill__network="resnet18_bn").stages("ingest")
    with pytest.raises(UserError, match="has batch norm"):
        run.stages("score")
