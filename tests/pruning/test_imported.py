"""Imported scores: all formats, the meaning of a position, what is refused, and exports that read back."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import tiny_config

from distill_at_scale import cli
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.stages import score
from distill_at_scale.pruning import export as exported
from distill_at_scale.pruning.criteria.factory import build_criteria
from distill_at_scale.pruning.scoring import imported, score_table
from distill_at_scale.pruning.scoring.columns import training_ids
from distill_at_scale.storage.run_dir import RunDir


@pytest.fixture(scope="module")
def ids(digits_run):
    return training_ids(PreparedDataset(digits_run.dir / "prepared"))


@pytest.fixture(scope="module")
def listed(digits_run):
    """The training ids of the tiny run in the order of the source's listing."""
    return ingest.plan(digits_run.config).listings["train"]["sample_id"].to_pylist()


def number_of(sample_id):
    """A score derived from the id."""
    return int(sample_id.partition("/")[2]) + 0.5


def with_file(tmp_path, name, **more):
    return tiny_config(tmp_path / "run", score__imported={"mine": str(tmp_path / name)}, **more)


def by_position(tmp_path, name, values):
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(values), encoding="utf-8")
    else:
        (np.savez if path.suffix == ".npz" else np.save)(path, np.array(values))
    return path


def read(config, ids):
    return imported.columns(config, ids)["mine"].values(ids)


@pytest.mark.parametrize("name", ["mine.json", "mine.npy", "mine.npz"])
def test_position_i_is_sample_i_of_the_listing_before_it_is_sorted(tmp_path, ids, listed, name):
    assert listed != ids.to_pylist()
    by_position(tmp_path, name, [number_of(i) for i in listed])
    assert read(with_file(tmp_path, name), ids).tolist() == [number_of(i) for i in ids.to_pylist()]


def test_a_file_for_the_whole_split_of_the_source_serves_a_subset_of_it(tmp_path, ids):
    by_position(tmp_path, "mine.json", [k + 0.5 for k in range(1797)])
    assert read(with_file(tmp_path, "mine.json"), ids).tolist() == [number_of(i) for i in ids.to_pylist()]


def test_an_object_with_positions_for_keys_is_read_as_its_authors_publish_it(tmp_path, ids, listed):
    values = {str(k): number_of(i) for k, i in enumerate(listed)}
    by_position(tmp_path, "mine.json", dict(reversed(values.items())))
    assert read(with_file(tmp_path, "mine.json"), ids).tolist() == [number_of(i) for i in ids.to_pylist()]


def test_several_trials_are_averaged(tmp_path, ids, listed):
    by_position(tmp_path, "mine.npy", [[number_of(i) - 1, number_of(i) + 1] for i in listed])
    assert read(with_file(tmp_path, "mine.npy"), ids).tolist() == [number_of(i) for i in ids.to_pylist()]


@pytest.mark.parametrize("name", ["mine.csv", "mine.parquet"])
@pytest.mark.parametrize("column", ["mine", "score"])
def test_tables_are_joined_by_id(tmp_path, ids, name, column):
    shuffled = np.random.default_rng(0).permutation(ids.to_pylist()).tolist()
    table = pa.table({"sample_id": shuffled, column: [number_of(i) for i in shuffled]})
    (pyarrow.csv.write_csv if name.endswith("csv") else pq.write_table)(table, tmp_path / name)
    assert read(with_file(tmp_path, name), ids).tolist() == [number_of(i) for i in ids.to_pylist()]


def test_ids_that_look_like_numbers_or_like_nothing_stay_as_they_are(tmp_path):
    (tmp_path / "mine.csv").write_text('"sample_id","mine"\n"0001",1\n"0010",2\n', encoding="utf-8")
    assert imported.read("mine", str(tmp_path / "mine.csv")).ids.to_pylist() == ["0001", "0010"]
    (tmp_path / "mine.csv").write_text("sample_id,mine\n0001,1\nNA,\n", encoding="utf-8")
    assert imported.read("mine", str(tmp_path / "mine.csv")).ids.to_pylist() == ["0001", "NA"]


def test_samples_without_a_position_are_not_exported_by_position(tmp_path, listed, digits_run):
    ids = pa.chunked_array([[listed[0], f"{listed[0]}#1"]])
    with pytest.raises(UserError, match=r"1 of 2 samples have no position .*#1'.* write \*.csv"):
        exported._ids_by_position(tmp_path / "x.json", ids, digits_run.config)


def test_a_rejected_sample_keeps_its_position(tmp_path, ids, listed):
    """Two samples were rejected at ingest and have null."""
    lost = {listed[3], listed[10]}
    left = pa.array([i for i in ids.to_pylist() if i not in lost])
    by_position(tmp_path, "mine.json", [None if i in lost else number_of(i) for i in listed])
    assert read(with_file(tmp_path, "mine.json"), left).tolist() == [number_of(i) for i in left.to_pylist()]


def test_a_table_may_hold_samples_of_the_source_that_are_not_used(tmp_path, ids):
    every = [f"digits/{k:04d}" for k in range(1797)]
    pq.write_table(pa.table({"sample_id": every, "mine": [number_of(i) for i in every]}), tmp_path / "mine.parquet")
    assert read(with_file(tmp_path, "mine.parquet"), ids).tolist() == [number_of(i) for i in ids.to_pylist()]


def test_the_direction_is_what_the_configuration_says(tmp_path, ids, listed):
    by_position(tmp_path, "mine.npy", [number_of(i) for i in listed])
    for end in ("low", "high"):
        config = with_file(tmp_path, "mine.npy", score__imported_useful={"mine": end})
        assert imported.columns(config, ids)["mine"].useful == end
    assert imported.columns(with_file(tmp_path, "mine.npy"), ids)["mine"].useful == "low"


def test_a_wrong_count_says_both_before_anything_is_computed(tmp_path, listed):
    by_position(tmp_path, "mine.npy", [0.5] * 50000)
    with pytest.raises(
        UserError, match=f"holds 50000 scores, the training split has 1797 samples, {len(listed)} of them"
    ):
        imported.check(with_file(tmp_path, "mine.npy"))


def test_ids_that_are_missing_are_counted_and_the_first_is_named(tmp_path, ids):
    some = ids.to_pylist()[2:]
    pq.write_table(pa.table({"sample_id": some, "mine": [0.5] * len(some)}), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=f"lacks 2 of {len(ids)} training samples, first '{ids[0].as_py()}'"):
        read(with_file(tmp_path, "mine.parquet"), ids)


def test_ids_of_another_data_set_are_refused(tmp_path, ids):
    some = [*ids.to_pylist(), "cats/1.png"]
    pq.write_table(pa.table({"sample_id": some, "mine": [0.5] * len(some)}), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=r"1 ids that are not training samples .* the first is 'cats/1.png'"):
        read(with_file(tmp_path, "mine.parquet"), ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300, None])
def test_a_score_that_is_not_finite_names_sample_and_position(tmp_path, ids, listed, bad):
    values = [number_of(i) for i in listed]
    values[7] = bad
    by_position(tmp_path, "mine.json", values)
    with pytest.raises(UserError, match=rf"score of sample '{listed[7]}' \(position 7\) is not a finite"):
        read(with_file(tmp_path, "mine.json"), ids)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1, 2", "cannot be read"),
        ("a.json", '["x", "y"]', "not numbers, for example 'x'"),
        ("a.json", "[[1, 2], [3]]", "different lengths"),
        ("a.json", "[[[1]]]", r"shape \[1, 1, 1\]"),
        ("a.json", "3", r"shape \[\]"),
        ("a.json", "[]", r"shape \[0\]"),
        ("a.json", "[true, false]", "not numbers"),
        ("a.json", '{"0": 1, "2": 3}', 'object without "1"'),
        ("a.json", '{"x.png": 1}', 'object without "0"'),
        ("a.npy", "nonsense", "cannot be read"),
        ("a.npz", "nonsense", "cannot be read"),
        ("a.parquet", "nonsense", "cannot be read"),
        ("a.csv", "sample_id,loss\na,1\n", "no column a or score, only sample_id, loss"),
        ("a.csv", "id,a\na,1\n", "no column sample_id"),
        ("a.csv", "sample_id,a\nx,1\nx,2\n", "'x' more than once"),
        ("a.csv", "sample_id,a\nx,low\n", "holds string, not numbers"),
    ],
)
def test_a_file_that_is_not_a_list_of_numbers_is_refused_with_a_reason(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        imported.read("a", str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_an_archive_of_several_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(3))
    with pytest.raises(UserError, match=r"holds 2 arrays \(x, y\)"):
        imported.read("a", str(tmp_path / "a.npz"))


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        imported.read("a", str(tmp_path / "a.npy"))


def test_one_score_for_all_samples_ranks_nothing(tmp_path, ids, listed):
    by_position(tmp_path, "mine.npy", [0.25] * len(listed))
    with pytest.raises(UserError, match=rf"all {len(ids)} training samples have the score 0\.25, which ranks nothing"):
        read(with_file(tmp_path, "mine.npy"), ids)


@pytest.mark.parametrize(("sign", "useful", "against"), [(1, {}, False), (-1, {}, True), (-1, {"mine": "high"}, False)])
def test_a_score_that_ranks_against_the_loss_is_remarked_on(tmp_path, digits_run, sign, useful, against):
    table, _ = score_table.read(digits_run.dir / "scores.parquet", ["sample_id", "label", "loss"])
    mine = sign * table["loss"].to_numpy() ** 2
    facts = {"scores": json.dumps({"useful": {"loss": "low", "mine": useful.get("mine", "low")}})}
    table = table.append_column("mine", pa.array(mine)).append_column("score", table["loss"])
    pq.write_table(table.replace_schema_metadata(facts), tmp_path / "scores.parquet")
    lines = imported.remarks(with_file(tmp_path, "x.npy", score__imported_useful=useful), tmp_path / "scores.parquet")
    assert bool(lines) == against
    if against:
        assert "ranks samples against loss (rank correlation -1.00)" in lines[0]
        assert "set score.imported_useful: {mine: high}" in lines[0]


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"score.imported.a = 'no/such.json' does not exist"):
        imported.read("a", "no/such.json")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"score__imported": {"loss": "a.npy"}}, "'loss' is already the name of a criterion"),
        ({"score__imported": {"score": "a.npy"}}, "'score' is already the name of a criterion or column"),
        ({"score__imported": {"a b": "a.npy"}}, "'a b' is not a valid name"),
        ({"score__imported": {"a": "a.txt"}}, "unknown file type"),
        ({"score__imported_useful": {"a": "low"}}, "'a', which is not in score.imported"),
        ({"select__criterion": {}}, "weighs nothing"),
        ({"select__criterion": {"loss": 1.0, "el2m": 0.5}}, "weighs 'el2m', which is not scored"),
        ({"select__criterion": {"loss": 0.0}}, "the weight of 'loss' is 0"),
        ({"select__criterion": {"loss": 1.0}, "select__order": "low"}, "set select.order to useful"),
    ],
)
def test_names_and_weights_are_checked_before_anything_is_computed(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        validate.check_names(tiny_config(tmp_path, **keys))


def test_imported_scores_may_be_selected_and_weighed_by(tmp_path):
    for chosen in ("mine", {"loss": 1.0, "mine": 0.5}):
        validate.check_names(with_file(tmp_path, "mine.npy", select__criterion=chosen))
    validate.check_names(with_file(tmp_path, "mine.npy", score__criterion="mine"))


def test_with_imported_scores_alone_nothing_is_left_to_proxies(tmp_path):
    assert list(build_criteria(with_file(tmp_path, "mine.npy", score__criterion="mine").score)) == []
    both = ["loss", "mine", "monte_carlo"]
    assert list(build_criteria(with_file(tmp_path, "mine.npy", score__criterion=both).score)) == ["loss"]


def test_the_fingerprint_covers_what_a_file_holds_and_not_where_it_lies(tmp_path, digits_run):
    run = RunDir(digits_run.dir)

    def fingerprint(name, values, **more):
        by_position(tmp_path, name, values)
        return score.inputs(with_file(tmp_path, name, **more), run).fingerprint

    first = fingerprint("a.npy", [1.0, 2.0])
    assert fingerprint("b.npy", [1.0, 2.0]) == first
    assert fingerprint("a.npy", [1.0, 3.0]) != first
    assert fingerprint("b.npy", [1.0, 2.0], score__imported_useful={"mine": "high"}) != first


def test_a_file_that_is_gone_leaves_its_scores_valid_but_not_those_under_another_name(
    tmp_path, digits_run, monkeypatch
):
    run = RunDir(str(digits_run.dir))
    record = run.record("score") | {"content": {"imported mine": "aa"}}
    monkeypatch.setattr(RunDir, "record", lambda self, stage: record)
    (tmp_path / "other.npy").write_bytes(b"1")

    def content(**files):
        config = tiny_config(tmp_path / "run", score__imported={k: str(tmp_path / v) for k, v in files.items()})
        return score.imported_content(config, run)

    assert content(mine="gone.npy") == {"imported mine": "aa"}
    assert list(content(mine="gone.npy", other="other.npy")) == ["imported mine", "imported other"]
    with pytest.raises(UserError, match=r"score.imported.yours = .* does not exist"):
        content(yours="gone.npy")


def test_the_fingerprint_ignores_what_is_not_used(tmp_path, digits_run):
    run = RunDir(digits_run.dir)

    def fingerprint(**keys):
        return score.inputs(tiny_config(tmp_path, **keys), run).fingerprint

    assert fingerprint(score__monte_carlo__subsets=7) == fingerprint()
    sampled = fingerprint(score__criterion="monte_carlo")
    assert fingerprint(score__criterion="monte_carlo", score__monte_carlo__subsets=7) != sampled
    assert fingerprint(score__criterion="monte_carlo", score__monte_carlo__at_once=3) == sampled
    assert fingerprint(score__criterion="monte_carlo", score__trials=7) == sampled
    assert fingerprint(score__criterion="monte_carlo", run={"seed": 5}) != sampled
    assert fingerprint(score__criterion="monte_carlo", distill__dc__image_lr=5.0) == sampled
    distilled = fingerprint(score__criterion="monte_carlo", score__monte_carlo__learn="dc")
    changed = fingerprint(score__criterion="monte_carlo", score__monte_carlo__learn="dc", distill__dc__image_lr=5.0)
    assert changed != distilled


@pytest.mark.parametrize("name", ["mine.json", "mine.csv", "mine.parquet"])
def test_what_is_exported_reads_back_to_the_same_bytes(tmp_path, digits_run, ids, name):
    scores = digits_run.dir / "scores.parquet"
    assert exported.scores(tmp_path / name, scores, digits_run.config) == len(ids)
    config = with_file(tmp_path, name)
    if not name.endswith("json"):  # tables name the column after its criterion
        config = tiny_config(tmp_path / "run", score__imported={"loss": str(tmp_path / name)})
    (column,) = imported.columns(config, ids).values()
    assert column.values(ids).tobytes() == score_table.read(scores, ["loss"])[0]["loss"].to_numpy().tobytes()


def test_the_kept_list_is_exported_by_id_and_by_position(tmp_path, digits_run, listed):
    manifest = digits_run.dir / "manifest.parquet"
    kept = pq.read_table(manifest, filters=[("kept", "=", True)])["sample_id"].to_pylist()
    for name in ("kept.csv", "kept.parquet", "kept.json"):
        assert exported.kept(tmp_path / name, manifest, digits_run.config) == len(kept)
    assert pyarrow.csv.read_csv(tmp_path / "kept.csv")["sample_id"].to_pylist() == kept
    assert pq.read_table(tmp_path / "kept.parquet").column_names == ["sample_id", "label", "score", "rank"]
    assert {listed[k] for k in json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))} == set(kept)


def test_scores_by_position_need_one_criterion(tmp_path, digits_run):
    config = tiny_config(digits_run.dir, select__criterion="random")
    with pytest.raises(UserError, match=r"set select.criterion to one of loss"):
        exported.scores(tmp_path / "a.json", digits_run.dir / "scores.parquet", config)


@pytest.fixture
def config_file(tmp_path, digits_run):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        json.dumps(digits_run.config.model_dump(exclude={"sweep", "studies"})), encoding="utf-8"
    )  # JSON is YAML
    return str(path)


def test_the_command_exports_scores_and_kept_samples(tmp_path, config_file, capsys):
    scores, kept = str(tmp_path / "a.csv"), str(tmp_path / "b.json")
    other = str(tmp_path / "c.parquet")
    arguments = ["export", config_file, "--scores", scores, "--scores", other, "cluster.address=none", "--kept", kept]
    assert cli.main(arguments) == 0
    assert (tmp_path / "c.parquet").is_file()
    assert "scores" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--scores FILE or --kept FILE"),
        (["--scores", "a.txt"], "a.txt has an unknown file type"),
        (["select.keep=0.9", "--kept", "a.csv"], "select.keep: 0.2 -> 0.9"),
        (["run.dir=nowhere", "--kept", "a.csv"], "no output of select yet"),
    ],
)
def test_the_command_refuses_what_it_cannot_export(config_file, capsys, arguments, message):
    assert cli.main(["export", config_file, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
