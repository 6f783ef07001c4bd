"""Row sources in parts: any order, pickled, Parquet's row groups, lines cut anywhere."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess import parquet_rows, row_sources, text_lines
from usdm_megatron.preprocess.row_sources import PackedTextSource, open_cache
from usdm_megatron.preprocess.rows import RowBlock, RowSource
from usdm_megatron.preprocess.text_lines import (
    LinePart,
    LinePlace,
    line_parts,
    parse_id_part,
    parse_label_lines,
    read_lines,
)

ROWS = [[1, *range(3, 3 + number % 9), 2] for number in range(50)]


def rows_of(blocks: list[RowBlock]) -> list[list[int]]:
    found = []
    for block in blocks:
        ends = np.cumsum(block.row_lengths)
        assert ends[-1] == len(block.tokens)
        found += [
            block.tokens[end - length : end].tolist()
            for end, length in zip(ends, block.row_lengths, strict=True)
        ]
    return found


def table(rows: Any, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"input_ids": pa.array(rows, kind or pa.list_(pa.int32())), "other": range(len(rows))})


@pytest.fixture(params=["text", "dataset", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowSource:
    """`ROWS` in at least five parts."""
    monkeypatch.setattr(row_sources, "TEXT_BLOCK_BYTES", 100)
    monkeypatch.setattr(row_sources, "CACHE_BLOCK_ROWS", 7)
    monkeypatch.setattr(parquet_rows, "PART_BYTES", 80)
    if request.param == "text":
        (tmp_path / "part0.txt").write_text("\n".join(" ".join(map(str, row)) for row in ROWS))
        return PackedTextSource([tmp_path / "part0.txt"])
    if request.param == "dataset":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset(table(ROWS)).save_to_disk(tmp_path / "cache", num_shards=3)
        return open_cache(tmp_path / "cache")[""]
    pq.write_table(table(ROWS), tmp_path / "rows.parquet", row_group_size=23)
    return open_cache(tmp_path / "rows.parquet")[""]


def test_parts_can_be_read_in_any_order_by_pickled_sources(source: RowSource) -> None:
    parts = list(source.parts())
    assert len(parts) >= 5
    assert rows_of(list(source.blocks())) == ROWS
    assert rows_of([source.read(part) for part in parts]) == ROWS
    for order in (
        range(len(parts)),
        reversed(range(len(parts))),
        np.random.default_rng(0).permutation(len(parts)),
    ):
        copy = pickle.loads(pickle.dumps(source))
        blocks = {number: pickle.loads(pickle.dumps(copy.read(parts[number]))) for number in order}
        assert rows_of([blocks[number] for number in range(len(parts))]) == ROWS


def test_rows_are_named_by_their_number_in_the_input(source: RowSource) -> None:
    places = [block.place(row) for block in source.blocks() for row in range(len(block.row_lengths))]
    first = 1 if "line" in places[0] else 0
    assert [int(place.rsplit(" ", 1)[1]) for place in places] == list(range(first, first + len(ROWS)))


# --- Parquet


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.uint16()), pa.list_(pa.int32(), 3)], ids=str
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_parquet_of_any_integer_lists(tmp_path: Path, kind: pa.DataType, compression: str) -> None:
    rows = [[1, number, 2] for number in range(3000)]
    pq.write_table(table(rows, kind), tmp_path / "x.parquet", compression=compression, row_group_size=700)
    (opened,) = open_cache(tmp_path).values()
    assert rows_of(list(opened.blocks())) == rows


def test_a_directory_of_parquet_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9):
        pq.write_table(table([[1, number]]), tmp_path / f"part{number}.parquet")
    opened = open_cache(tmp_path)
    assert list(opened) == [""]
    assert rows_of(list(opened[""].blocks())) == [[1, 9], [1, 10]]
    assert [name for name, _ in opened[""].files()] == ["part9.parquet", "part10.parquet"]


def test_files_named_as_on_the_hub_are_splits(tmp_path: Path) -> None:
    for name, row in (("train-00000-of-00002", 5), ("train-00001-of-00002", 6)):
        pq.write_table(table([[1, row]]), tmp_path / f"{name}.parquet")
    assert {name: rows_of(list(s.blocks())) for name, s in open_cache(tmp_path).items()} == {
        "": [[1, 5], [1, 6]]
    }
    pq.write_table(table([[1, 7]]), tmp_path / "test-00000-of-00001.parquet")
    assert {name: rows_of(list(s.blocks())) for name, s in open_cache(tmp_path).items()} == {
        "train": [[1, 5], [1, 6]],
        "test": [[1, 7]],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table([[1, 2]] * 6 + [[]]), "x.parquet row 6: holds no ids"),
        (table([[1, 2]] * 5 + [None, [1]]), "x.parquet row 5: is null"),
        (table([[1, 2]] * 5 + [[1, None]]), "x.parquet row 5: holds a null"),
        (
            table([[1.0]], pa.list_(pa.float32())),
            "column 'input_ids' is list<.*float>; a row is a list of integer",
        ),
        (table([]), "x.parquet: holds no rows"),
        (pa.table({"ids": [[1]]}), "x.parquet: no column 'input_ids', only ids"),
        (
            pa.table([pa.array([[1, 2]])] * 2, names=["input_ids"] * 2),
            "x.parquet: has column 'input_ids' 2 times; write it again with each of them once",
        ),
    ],
)
def test_parquet_that_holds_no_rows_of_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: pa.Table, message: str
) -> None:
    monkeypatch.setattr(parquet_rows, "PART_BYTES", 40)
    pq.write_table(content, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        list(open_cache(tmp_path / "x.parquet")[""].blocks())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_parquet_gives_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    pq.write_table(table(ROWS), path, row_group_size=20, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        blocks = list(open_cache(path)[""].blocks())
    except DataError:
        return
    assert all(len(block.tokens) == block.row_lengths.sum() for block in blocks)


# --- lines


@settings(deadline=None)
@given(
    content=st.binary(min_size=1, max_size=80).map(lambda b: b.replace(b"a", b"\n")),
    part_bytes=st.integers(1, 30),
)
def test_parts_are_whole_lines_and_all_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, part_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(content)
    parts = line_parts(path, "bytes", part_bytes=part_bytes)
    whole = content if content.endswith(b"\n") else content + b"\n"
    assert b"".join(read_lines(part) for part in parts) == whole
    assert all(part.end - part.start >= part_bytes for part in parts[:-1])
    for part in parts:
        lines_before = content[: part.start].count(b"\n")
        assert LinePlace(path, part.start)(2) == f"{path} line {lines_before + 3}"


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(
        st.lists(
            st.tuples(st.integers(0, 10**10) | st.integers(0, 50_000), st.booleans(), st.integers(0, 3)),
            min_size=1,
        ),
        min_size=1,
        max_size=6,
    ),
    chunk_bytes=st.integers(1, 40),
    gap=st.sampled_from(["\t", " ", "  ", " \r"]),
)
def test_numbers_as_python_reads_them(
    lines: list[list[tuple[int, bool, int]]], chunk_bytes: int, gap: str
) -> None:
    words = [["-" * minus + "0" * zeros + str(number) for number, minus, zeros in line] for line in lines]
    text = "".join(gap.join(line) + "\n" for line in words).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "_CHUNK_BYTES", chunk_bytes)
        found = parse_label_lines(text, LinePlace(Path("x"), 0), "numbers")
    assert found.numbers.tolist() == [int(word) for line in words for word in line]
    assert found.lengths.tolist() == [len(line) for line in words]


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(
        st.tuples(st.integers(0, 10**7) | st.integers(0, 300), st.integers(0, 80), st.sampled_from(" \n\t")),
        min_size=1,
        max_size=30,
    ),
    chunk_bytes=st.integers(1, 40),
    ends_with_newline=st.booleans(),
)
def test_a_part_is_parsed_as_its_text(
    tmp_path_factory: pytest.TempPathFactory,
    words: list[tuple[int, int, str]],
    chunk_bytes: int,
    ends_with_newline: bool,
) -> None:
    text = "".join("0" * zeros + str(number) + gap for number, zeros, gap in words).rstrip() + "\n"
    path = tmp_path_factory.getbasetemp() / "part.txt"
    path.write_text("7\n" + (text if ends_with_newline else text[:-1]), newline="")
    (part,) = line_parts(path, "ids")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "_CHUNK_BYTES", chunk_bytes)
        expected = text[:-1].split("\n")
        try:
            found = parse_id_part(replace(part, start=2), "ids")
        except DataError:
            assert not all(line.split() for line in expected)
        else:
            assert found.numbers.tolist() == [int(word) for word in text.split()]
            assert found.lengths.tolist() == [len(line.split()) for line in expected]


def test_a_part_of_a_file_that_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1 2\n")
    for read in (read_lines, lambda part: parse_id_part(part, "ids")):
        with pytest.raises(DataError, match="x: became shorter while it was read"):
            read(LinePart(tmp_path / "x", 0, 5))
        with pytest.raises(DataError, match=r"y: cannot be read \(No such file"):
            read(LinePart(tmp_path / "y", 0, 5))
