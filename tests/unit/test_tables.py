"""Result tables: what is written is what the name promises, in one order, whole, and nothing else is read."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moescope import tables
from moescope.tables import SCHEMAS, TableError

#: A value of each type for row i, no two alike where the type has more than two.
VALUES = {
    pl.Int32: lambda i: i,
    pl.Int64: lambda i: 10 * i,
    pl.String: lambda i: f"name {i}",
    pl.Float32: lambda i: i + 0.5,
    pl.Float64: lambda i: i + 0.25,
    pl.Boolean: lambda i: i % 2 == 0,
}
#: What the ``*`` of a column stands for in these tests; two of them, in an order that is not the alphabet's.
RELATIONS = ("landmark_on_continent", "capital")


def example(name: str, rows: int = 4) -> pl.DataFrame:
    """A valid table of a name, in the order of the schema, sorted, with wildcard columns filled in."""
    columns = {}
    for pattern, dtype in SCHEMAS[name].columns.items():
        for column in [pattern.replace("*", relation) for relation in RELATIONS] if "*" in pattern else [pattern]:
            columns[column] = pl.Series([VALUES[dtype](i) for i in range(rows)], dtype=dtype)
    return pl.DataFrame(columns)


def with_nth(frame: pl.DataFrame, column: str, value: object) -> pl.DataFrame:
    """The frame with the value in the second row of a column."""
    return frame.with_columns(
        pl.Series(column, [frame[column][0], value, *frame[column][2:]], dtype=frame[column].dtype)
    )


def refusal(frame: pl.DataFrame, name: str) -> str:
    with pytest.raises(TableError) as error:
        tables.check(frame, name)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(name)
    return message


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_hold_together(name: str):
    schema = SCHEMAS[name]
    assert set(schema.key) <= set(schema.required)
    assert len(set(schema.key)) == len(schema.key)
    assert schema.nullable <= set(schema.columns)
    assert set(schema.key) - schema.nullable  # a key that may be null all over would name nothing
    assert set(schema.columns.values()) <= set(VALUES)


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_order_of_rows_and_columns_becomes_one(name: str):
    frame = example(name)
    mixed = frame.select(reversed(frame.columns)).reverse()
    wild = [c for c in mixed.columns if c not in SCHEMAS[name].columns]  # these keep the order in which they came
    assert tables.check(mixed, name).equals(frame.select([*SCHEMAS[name].required, *wild]))


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_written_is_read(name: str, tmp_path: Path):
    path = tmp_path / "not" / "there" / f"{name}.parquet"
    frame = example(name)
    tables.write(frame.reverse(), path)
    found = tables.read(path)
    assert found.equals(frame)
    assert found.schema == frame.schema
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_equal_tables_are_equal_bytes(name: str, tmp_path: Path):
    one, two = tmp_path / "a" / f"{name}.parquet", tmp_path / "b" / f"{name}.parquet"
    frame = example(name, rows=3_000)
    tables.write(frame, one)
    tables.write(frame.sample(fraction=1.0, shuffle=True, seed=1), two)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_column_is_needed(name: str):
    for column in SCHEMAS[name].required:
        assert f"column {column} is missing" in refusal(example(name).drop(column), name)


@pytest.mark.parametrize("name", SCHEMAS)
def test_nulls_stand_only_where_they_may(name: str):
    frame = example(name)
    for column in frame.columns:
        holed = with_nth(frame, column, None)
        if column in SCHEMAS[name].nullable:
            assert tables.check(holed, name)[column].null_count() == 1
        else:
            assert f"column {column} holds 1 nulls" in refusal(holed, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_number_is_finite(name: str, bad: float):
    frame = example(name)
    for column in [c for c in frame.columns if frame[c].dtype.is_float()]:
        assert f"column {column} holds a number that is not finite" in refusal(with_nth(frame, column, bad), name)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_key_is_unique_and_no_shorter(name: str):
    frame, key = example(name), list(SCHEMAS[name].key)
    assert f"two rows share one {', '.join(key)}" in refusal(pl.concat([frame, frame[:1]]), name)
    for column in key:  # rows that differ in one part of the key only are different rows
        rows = frame[:2] if frame[column].dtype == pl.Boolean else frame  # a flag tells two rows apart
        alike = rows.with_columns(pl.col(c).first() for c in key if c != column)
        assert len(tables.check(alike, name)) == len(rows)


def test_a_null_is_one_value_of_the_key():
    twice = example("ffn_neurons").with_columns(pl.lit(None, pl.Int32).alias("expert"), pl.lit(0).alias("neuron"))
    alike = twice.with_columns(pl.lit(0).alias("layer"), pl.lit("dense").alias("kind"))
    assert "two rows share one" in refusal(alike, "ffn_neurons")
    assert len(tables.check(twice, "ffn_neurons")) == len(twice)


def test_rows_are_sorted_by_the_key_with_nulls_last():
    rows = [
        {"layer": 1, "kind": "dense", "expert": None, "neuron": 0},
        {"layer": 0, "kind": "shared", "expert": None, "neuron": 2},
        {"layer": 0, "kind": "shared", "expert": None, "neuron": 1},
        {"layer": 0, "kind": "routed", "expert": 10, "neuron": 0},
        {"layer": 0, "kind": "routed", "expert": 9, "neuron": 5},
    ]
    found = tables.check(pl.DataFrame(rows).with_columns(active=0, magnitude=0.0, importance=0.0), "ffn_neurons")
    assert found.select("layer", "kind", "expert", "neuron").rows() == [
        (0, "routed", 9, 5),
        (0, "routed", 10, 0),
        (0, "shared", None, 1),
        (0, "shared", None, 2),
        (1, "dense", None, 0),
    ]
    mean = {"step": 1, "tokens": 1, "aggregate": "mean", "component": "ffn", "value": 0.0, "low": None, "high": None}
    layers = tables.check(pl.DataFrame([{**mean, "layer": layer} for layer in (None, 1, 0)]), "layer_importance")
    assert layers["layer"].to_list() == [0, 1, None]


def test_strings_are_sorted_by_their_bytes():
    frame = example("exposure").with_columns(prompt_id=pl.Series(["é/0", "a/10", "a/2", "Z/0"]))
    assert tables.check(frame, "exposure")["prompt_id"].to_list() == ["Z/0", "a/10", "a/2", "é/0"]


def test_columns_are_cast_to_the_types_of_the_table():
    frame = example("routing").cast({"layer": pl.Int64, "expert": pl.UInt8, "weight": pl.Float64})
    found = tables.check(frame.with_columns(slot=pl.Series([1.0, None, 0.0, None])), "routing")
    assert found.schema == example("routing").schema
    assert found["slot"].to_list() == [1, None, 0, None]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("layer", ["first", "second"]),
        ("layer", [2**31, 0]),
        ("layer", [0.5, 1.0]),
        ("layer", [float("nan"), 1.0]),
        ("layer", [f"{i}th" for i in range(50)]),
        ("lpi", ["much", "little"]),
        ("lpi", [1e39, 0.0]),  # a float32 would be infinite
    ],
)
def test_what_a_type_cannot_hold_is_refused(column: str, values: list):
    frame = example("heads", rows=len(values)).with_columns(pl.Series(column, values))
    assert column in refusal(frame, "heads")


def test_unknown_columns_are_refused():
    assert "column score is not part of the table" in refusal(example("heads").with_columns(score=0.0), "heads")


def test_a_wildcard_is_a_free_part_of_a_name():
    schema = SCHEMAS["ffn_neurons"]
    assert schema.expected("importance_capital") == pl.Float32
    assert schema.expected("active_capital") == pl.Int64
    assert schema.expected("unimportance_capital") is None
    assert schema.expected("Importance_capital") is None
    for column in ("importance_capital", "active_capital"):
        assert f"column {column} holds 1 nulls" in refusal(
            with_nth(example("ffn_neurons"), column, None), "ffn_neurons"
        )
    bare = example("ffn_neurons").select(schema.required)
    assert tables.check(bare, "ffn_neurons").equals(bare)  # no relation at all is a table too


def test_a_table_without_rows_keeps_its_types():
    for name in SCHEMAS:
        empty = example(name, rows=0)
        assert tables.check(empty, name).schema == empty.schema


def test_unknown_tables_are_named_with_the_known_ones(tmp_path: Path):
    assert "no such table; known are ablations, accuracy, active_sums" in refusal(example("heads"), "haeds")
    with pytest.raises(TableError, match="no such table"):
        tables.write(example("heads"), tmp_path / "haeds.parquet")
    with pytest.raises(TableError, match="no such table"):
        tables.read(tmp_path / "haeds.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_table_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "heads.parquet"
    tables.write(example("heads"), path)
    before = path.read_bytes()
    with pytest.raises(TableError):
        tables.write(example("heads").drop("lpi"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "heads.parquet"
    tables.write(example("heads"), path)
    before = path.read_bytes()

    def full_disk(frame: pl.DataFrame, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"PAR1, and then the disk was full")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tables.write(example("heads", rows=9), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_some_columns_alone(tmp_path: Path):
    path, frame = tmp_path / "ffn_neurons.parquet", example("ffn_neurons")
    tables.write(frame, path)
    wanted = ["neuron", "importance_capital"]
    assert tables.read(path, wanted).select(wanted).equals(frame.select(wanted))
    assert sorted(tables.read(path, wanted).columns) == sorted(wanted)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda frame: frame.drop("lpi"), "lpi"),
        (lambda frame: frame.cast({"head": pl.Int64}), "head"),
        (lambda frame: frame.with_columns(score=1.0), "score"),
        (lambda frame: frame.rename({"prompt_id": "prompt"}), "prompt_id"),
    ],
)
def test_files_of_others_are_refused(tmp_path: Path, change, column: str):
    path = tmp_path / "heads.parquet"
    change(example("heads")).write_parquet(path)
    with pytest.raises(TableError, match=rf"heads\.parquet: column {column} is .*; delete the file and run again$"):
        tables.read(path, ["layer"])


def test_the_type_of_a_wildcard_column_counts(tmp_path: Path):
    path = tmp_path / "ffn_neurons.parquet"
    example("ffn_neurons").cast({"importance_capital": pl.Float64}).write_parquet(path)
    with pytest.raises(TableError, match="column importance_capital"):
        tables.read(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"subject,object\n" * 40])
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "heads.parquet"
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"heads\.parquet: is no Parquet file; delete the file and run again$"):
        tables.read(path)


def test_rows_become_a_checked_table():
    frame = example("overlap")
    assert tables.of_rows(frame.rows(), "overlap").equals(frame)
    assert tables.of_rows([], "overlap").schema == frame.schema
    with pytest.raises(TableError):
        tables.of_rows([(*frame.row(0)[:-1], None)], "overlap")


def test_what_is_not_finite_is_not_available():
    assert [tables.number(x) for x in (0.5, float("nan"), float("inf"), np.float32(2))] == [0.5, None, None, 2.0]
