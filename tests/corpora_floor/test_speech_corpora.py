"""Manifests are read right, in any order, and everything wrong is named by id or by line."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpora_floor.speech import make_records, write_jsonl
from usdm_megatron.corpora import speech_corpora
from usdm_megatron.corpora.alignment import Utterance, Word
from usdm_megatron.corpora.speech_corpora import ManifestCorpus, parse_record
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.samples import Rejection

RECORDS = make_records(23)


def read_all(corpus: Any) -> list[Utterance | Rejection]:
    return [found for part in corpus.parts() for found in corpus.read(part)]


def as_record(utterance: Utterance | Rejection) -> dict[str, Any]:
    assert isinstance(utterance, Utterance), utterance
    assert utterance.units.dtype == np.int32
    return {
        "id": utterance.id,
        "units": utterance.units.tolist(),
        "words": [{"text": word.text, "start": word.start_s, "end": word.end_s} for word in utterance.words],
        "duration": utterance.duration_s,
    }


def reasons(found: list[Utterance | Rejection]) -> Counter[str]:
    return Counter(one.reason for one in found if isinstance(one, Rejection))


# ── JSONL ──


@pytest.mark.parametrize("part_bytes", [1 << 23, 5_000, 1])
def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    monkeypatch.setattr(speech_corpora, "PART_BYTES", part_bytes)
    corpus = ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", RECORDS)])
    assert (len(corpus.parts()) > 1) == (part_bytes < 1 << 23)
    assert [as_record(found) for found in read_all(corpus)] == RECORDS


def test_units_as_a_string_and_no_duration(tmp_path: Path) -> None:
    plain = {name: RECORDS[0][name] for name in ("id", "words", "units")}
    spaced = {**plain, "units": " ".join(map(str, plain["units"])) + "\n"}
    found = read_all(ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", [plain, b"", spaced])]))
    assert [as_record(one) for one in found] == [{**plain, "duration": None}] * 2


def test_files_in_natural_order_and_parts_in_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_corpora, "PART_BYTES", 2_000)
    paths = [
        write_jsonl(tmp_path / f"m{number}.jsonl", RECORDS[at : at + 8])
        for number, at in ((10, 16), (2, 8), (1, 0))
    ]
    corpus = ManifestCorpus(paths)
    assert [name for name, _ in corpus.files()] == ["m1.jsonl", "m2.jsonl", "m10.jsonl"]
    parts = pickle.loads(pickle.dumps(corpus.parts()))
    backwards = {n: list(corpus.read(part)) for n, part in reversed(list(enumerate(parts)))}
    assert [as_record(found) for n in range(len(parts)) for found in backwards[n]] == RECORDS


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"id": "a", "units": [1, 2', "not JSON"),
        (b'{"id": "a", "units": "\xff\xfe"}', "byte 23 is not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "[1, 2] is no utterance"),
        (b'{"units": [1]}', "id is None"),
        (b'{"id": ["a"]}', "id is ['a']"),
        (b'{"id": "\\ud800"}', "id is '\\ud800'"),
        (b'{"id": "a", "units": [' + b"9" * 5000 + b"]}", "not JSON"),
    ],
)
def test_broken_lines_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, problem: str
) -> None:
    monkeypatch.setattr(speech_corpora, "PART_BYTES", 3_000)
    path = write_jsonl(tmp_path / "m.jsonl", [*RECORDS[:17], line, *RECORDS[17:20], line, *RECORDS[20:]])
    with pytest.raises(DataError) as caught:
        read_all(ManifestCorpus([path]))
    assert str(caught.value).startswith(f"{path} line 18: ")
    assert problem in caught.value.problems[0]


def test_all_broken_lines_of_a_part_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [RECORDS[0], b"{", RECORDS[1], b"\xff", b"7"])
    with pytest.raises(DataError) as caught:
        read_all(ManifestCorpus([path]))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"{path} line {number}" for number in (2, 4, 5)
    ]


def test_many_broken_lines_are_not_all_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [b"no"] * 1000)
    with pytest.raises(DataError) as caught:
        read_all(ManifestCorpus([path]))
    assert len(caught.value.problems) == 10


WORDS = RECORDS[0]["words"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"units": None}, "units_missing"),
        ({"units": []}, "units_missing"),
        ({"units": " "}, "units_missing"),
        ({"units": [1, "2"]}, "malformed_units"),
        ({"units": [1, 2.0]}, "malformed_units"),
        ({"units": [1, True]}, "malformed_units"),
        ({"units": [1, None]}, "malformed_units"),
        ({"units": {"a": 1}}, "malformed_units"),
        ({"units": "1 -2"}, "malformed_units"),
        ({"units": "1,2"}, "malformed_units"),
        ({"units": "1 ٣"}, "malformed_units"),
        ({"units": [1, -2]}, "unit_out_of_range"),
        ({"units": [2**31]}, "unit_out_of_range"),
        ({"units": [10**30]}, "unit_out_of_range"),
        ({"units": "1 99999999999999999999999"}, "unit_out_of_range"),
        ({"words": None}, "malformed_words"),
        ({"words": "the river"}, "malformed_words"),
        ({"words": [*WORDS, "and"]}, "malformed_words"),
        ({"words": [*WORDS, {"text": "and", "start": 9}]}, "malformed_words"),
        ({"words": [*WORDS, {"text": None, "start": 9, "end": 10}]}, "malformed_words"),
        ({"words": [*WORDS, {"text": "and", "start": "9", "end": 10}]}, "malformed_words"),
        ({"words": [*WORDS, {"text": "and", "start": 9, "end": 10**400}]}, "malformed_words"),
        ({"words": [*WORDS, {"text": "\ud800", "start": 9, "end": 10}]}, "malformed_words"),
        ({"duration": "3 s"}, "malformed_duration"),
        ({"duration": float("nan")}, "malformed_duration"),
        ({"duration": 0}, "malformed_duration"),
        ({"duration": 10**400}, "malformed_duration"),
    ],
)
def test_broken_utterances_are_rejected(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    broken = {**RECORDS[0], **changes}
    found = read_all(ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", [RECORDS[1], broken, RECORDS[2]])]))
    rejection = found.pop(1)
    assert isinstance(rejection, Rejection)
    assert (rejection.where, rejection.reason) == (RECORDS[0]["id"], reason)
    assert rejection.detail and len(rejection.detail) < 200
    assert [as_record(one) for one in found] == RECORDS[1:3]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "units", "words", "text", "start", "end"]), inner, max_size=6
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(
    JSON | st.fixed_dictionaries({"id": st.text(), "units": JSON, "words": st.lists(JSON), "duration": JSON})
)
def test_any_json_gives_an_utterance_or_says_why_not(record: Any) -> None:
    try:
        found = parse_record(record, lambda: "here")
    except DataError as error:
        assert str(error).startswith("here: ")
    else:
        assert isinstance(found, Rejection) or all(isinstance(word, Word) for word in found.words)


@pytest.mark.parametrize("names", [[], ["none.jsonl"], ["m.jsonl", "m.jsonl"]])
def test_files_that_cannot_be_read(tmp_path: Path, names: list[str]) -> None:
    write_jsonl(tmp_path / "m.jsonl", RECORDS[:1])
    with pytest.raises(DataError, match="--manifest"):
        ManifestCorpus([tmp_path / name for name in names])


def test_an_empty_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").touch()
    with pytest.raises(DataError, match="the file is empty"):
        ManifestCorpus([tmp_path / "m.jsonl"]).parts()


# ── Parquet ──


def write_parquet(path: Path, records: list[dict[str, Any]], units: pa.DataType, rows: int) -> Path:
    columns = {name: [record[name] for record in records] for name in records[0]}
    if pa.types.is_string(units):
        columns["units"] = [" ".join(map(str, numbers)) for numbers in columns["units"]]
    table = pa.table(columns)
    table = table.set_column(table.column_names.index("units"), "units", pa.array(columns["units"], units))
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.mark.parametrize("part_rows", [2000, 4, 1])
@pytest.mark.parametrize(
    "units", [pa.list_(pa.int64()), pa.list_(pa.uint16()), pa.large_list(pa.int32()), pa.string()]
)
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: pa.DataType, part_rows: int) -> None:
    """Row groups of ten rows, read whole, in batches, in order and backwards."""
    monkeypatch.setattr(speech_corpora, "PART_ROWS", part_rows)
    corpus = ManifestCorpus([write_parquet(tmp_path / "m.parquet", RECORDS, units, rows=10)])
    assert [as_record(found) for found in read_all(corpus)] == RECORDS
    parts = corpus.parts()
    corpus = pickle.loads(pickle.dumps(corpus))
    backwards = {n: list(corpus.read(part)) for n, part in reversed(list(enumerate(parts)))}
    assert [as_record(found) for n in range(len(parts)) for found in backwards[n]] == RECORDS


def test_parquet_without_durations_and_with_integer_ids(tmp_path: Path) -> None:
    records = [{**record, "id": number} for number, record in enumerate(RECORDS[:3])]
    for record in records:
        del record["duration"]
    path = write_parquet(tmp_path / "m.parquet", records, pa.list_(pa.int64()), rows=10)
    expected = [{**record, "id": str(record["id"]), "duration": None} for record in records]
    assert [as_record(found) for found in read_all(ManifestCorpus([path]))] == expected


def test_broken_parquet_rows_are_rejected(tmp_path: Path) -> None:
    units = [None, [], [1, None], [1, -1], [1, 2]]
    columns = {
        "id": [f"u{number}" for number in range(5)],
        "units": pa.array(units, pa.list_(pa.int64())),
        "words": [[{"text": "a", "start": 0.0, "end": 0.1}]] * 4 + [None],
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    found = read_all(ManifestCorpus([tmp_path / "m.parquet"]))
    assert [(one.where, one.reason) for one in found if isinstance(one, Rejection)] == [
        ("u0", "units_missing"),
        ("u1", "units_missing"),
        ("u2", "malformed_units"),
        ("u3", "unit_out_of_range"),
        ("u4", "malformed_words"),
    ]


def test_null_units_shift_no_other_row(tmp_path: Path) -> None:
    records = [
        {**record, "units": None if number % 3 == 1 else record["units"]}
        for number, record in enumerate(RECORDS)
    ]
    path = write_parquet(tmp_path / "m.parquet", records, pa.list_(pa.int32()), rows=7)
    found = read_all(ManifestCorpus([path]))
    assert reasons(found) == {"units_missing": 8}
    kept = [as_record(one) for one in found if isinstance(one, Utterance)]
    assert kept == [record for record in records if record["units"] is not None]


def test_parquet_rows_without_an_id_are_named(tmp_path: Path) -> None:
    records = [*RECORDS[:2], {**RECORDS[2], "id": None}]
    path = write_parquet(tmp_path / "m.parquet", records, pa.list_(pa.int32()), rows=2)
    with pytest.raises(DataError, match="m.parquet row 2: id is None"):
        read_all(ManifestCorpus([path]))


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "codes": [[1]]}), tmp_path / "m.parquet")
    with pytest.raises(DataError, match="no column units, words, only id, codes"):
        ManifestCorpus([tmp_path / "m.parquet"]).parts()


def test_columns_that_come_twice(tmp_path: Path) -> None:
    columns = {"id": ["a"], "units": [[1]], "words": [[]]}
    arrays = [*map(pa.array, columns.values()), pa.array([[1]]), pa.array(["a"])]
    pq.write_table(pa.table(arrays, names=[*columns, "units", "id"]), tmp_path / "m.parquet")
    with pytest.raises(DataError, match="m.parquet: has column 'id' 2 times, 'units' 2 times; write it"):
        ManifestCorpus([tmp_path / "m.parquet"]).parts()


def test_a_missing_duration_as_pandas_writes_it(tmp_path: Path) -> None:
    records = [{**RECORDS[0], "duration": float("nan")}, RECORDS[1]]
    path = write_parquet(tmp_path / "m.parquet", records, pa.list_(pa.int32()), rows=2)
    assert [as_record(one)["duration"] for one in read_all(ManifestCorpus([path]))] == [
        None, RECORDS[1]["duration"],
    ]  # fmt: skip


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", RECORDS[:2])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [as_record(one) for one in read_all(ManifestCorpus([path]))] == RECORDS[:2]


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "m.parquet", RECORDS[:1], pa.list_(pa.int32()), rows=2)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match="holds no rows"):
        ManifestCorpus([path]).parts()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_parquet_is_a_data_error_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "whole.parquet"
    if not path.exists():
        write_parquet(path, RECORDS, pa.list_(pa.int32()), rows=10)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = path.with_name("damaged.parquet")
    damaged.write_bytes(content)
    try:
        read_all(ManifestCorpus([damaged]))
    except DataError as error:
        assert str(damaged) in str(error)
