"""Readers against plain Python: every row as written, and every malformed input by file and line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from usdm_megatron.data.token_store import SourceFile
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess import row_sources
from usdm_megatron.preprocess.row_sources import PackedTextSource, open_cache
from usdm_megatron.preprocess.rows import RowSource, cut_samples
from usdm_megatron.preprocess.source_hashes import SourceHasher
from usdm_megatron.preprocess.text_lines import natural_key


def rows_of(source: RowSource) -> list[list[int]]:
    rows = []
    for block in source.blocks():
        ends = np.cumsum(block.row_lengths)
        assert ends[-1] == len(block.tokens)
        rows += [
            block.tokens[end - length : end].tolist()
            for end, length in zip(ends, block.row_lengths, strict=True)
        ]
    return rows


def places_of(source: RowSource) -> list[str]:
    return [block.place(row) for block in source.blocks() for row in range(len(block.row_lengths))]


def text_rows(path: Path, content: bytes) -> list[list[int]]:
    path.write_bytes(content)
    return rows_of(PackedTextSource([path]))


# --- part*.txt


def test_files_are_read_in_natural_order(tmp_path: Path) -> None:
    numbers = [10, 2, 1, 33, 9]
    for number in numbers:
        (tmp_path / f"part{number}.txt").write_text(f"1 {number}\n1 {number} 2\n")
    source = PackedTextSource(
        sorted(tmp_path.glob("part*.txt"))
    )  # as a shell expands it: part10 before part2
    assert rows_of(source) == [row for n in sorted(numbers) for row in ([1, n], [1, n, 2])]
    assert [name for name, _ in source.files()] == [f"part{n}.txt" for n in sorted(numbers)]
    assert places_of(source)[:3] == [
        f"{tmp_path}/part1.txt line 1",
        f"{tmp_path}/part1.txt line 2",
        f"{tmp_path}/part2.txt line 1",
    ]


def test_natural_order_of_odd_names() -> None:
    names = ["part", "part1", "part1b", "part02", "part10", "1part", "10part", "2part", "a2b10", "a2b9"]
    assert sorted(names, key=natural_key) == [
        *("1part", "2part", "10part", "a2b9", "a2b10"),
        *("part", "part1", "part1b", "part02", "part10"),
    ]


@pytest.mark.parametrize(
    "content",
    [b"1 5 2\n1 6\n", b"1 5 2\n1 6", b"1 5 2\r\n1 6\r\n", b" 1  5\t2 \n\t1 6 \n", b"01 005 2\n1 6\n"],
)
def test_white_space_and_line_ends(tmp_path: Path, content: bytes) -> None:
    assert text_rows(tmp_path / "p.txt", content) == [[1, 5, 2], [1, 6]]


@given(
    rows=st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), min_size=1, max_size=20),
    block_bytes=st.integers(1, 50),
    ends_with_newline=st.booleans(),
)
def test_lines_cut_anywhere_by_the_block_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], block_bytes: int, ends_with_newline: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    path.write_text(text + "\n" * ends_with_newline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_sources, "TEXT_BLOCK_BYTES", block_bytes)
        source = PackedTextSource([path])
        assert rows_of(source) == rows
        assert places_of(source) == [f"{path} line {n + 1}" for n in range(len(rows))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 5 2\n1 x7 2\n", r"line 2: 'x7' is no token id; ids are decimal numbers, space separated"),
        (b"1 5 2\n1 5 -3\n", r"line 2: '-3' is no token id"),
        (b"1 5.0 2\n", r"line 1: '5.0' is no token id"),
        (b"1,5,2\n", r"line 1: '1,5,2' is no token id"),
        (b"[1, 5, 2]\n", r"line 1: '\[1,' is no token id"),
        (b"1 5 2|-100 5 2\n", r"line 1: '2\|-100' is no token id"),
        (b"1 5\n\n1 6\n", "line 2: the line holds no ids"),
        (b"1 5\n   \n", "line 2: the line holds no ids"),
        (b"\n", "line 1: the line holds no ids"),
        (b"", "the file is empty"),
        (b"1 5\n1 \xff\xfe 2\n", r"line 2: '\\\\xff\\\\xfe' is no token id"),
        ("1 ５ 2\n".encode(), "line 1: '５' is no token id"),
        (b"\xef\xbb\xbf1 5\n", r"line 1: '\\ufeff1' is no token id"),
        (b"1 5\x00 2\n", "line 1: '5.x00' is no token id"),
        (b"1 \x0b 2\n", "line 1: '.x0b' is no token id"),
    ],
)
@pytest.mark.parametrize("block_bytes", [4, 8 << 20])
def test_malformed_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str, block_bytes: int
) -> None:
    monkeypatch.setattr(row_sources, "TEXT_BLOCK_BYTES", block_bytes)
    with pytest.raises(DataError, match=f"bad.txt:? {message}"):
        text_rows(tmp_path / "bad.txt", content)


def test_numbers_beyond_int64_stay_outside_every_vocabulary(tmp_path: Path) -> None:
    ((bos, huge),) = text_rows(tmp_path / "p.txt", b"1 99999999999999999999999\n")
    assert bos == 1
    assert huge > 2**62


def test_a_line_without_end_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "TEXT_BLOCK_BYTES", 64)
    monkeypatch.setattr(row_sources, "LONGEST_LINE_BYTES", 1000)
    with pytest.raises(DataError, match="line 2: longer than 0 MiB"):
        text_rows(tmp_path / "p.txt", b"1 2\n" + b"7 " * 2000)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "part1.txt").write_text("1 2\n")
    with pytest.raises(DataError) as caught:
        PackedTextSource([tmp_path / "part1.txt", tmp_path / "part2.txt", tmp_path])
    assert len(caught.value.problems) == 2
    assert "part2.txt: no such file; --input takes the part*.txt files" in caught.value.problems[0]
    with pytest.raises(DataError, match="no file given"):
        PackedTextSource([])
    with pytest.raises(DataError, match="part1.txt given twice"):
        PackedTextSource([tmp_path / "part1.txt", tmp_path / "part1.txt"])


# --- datasets on disk


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """`save(train=table, …)` saves a DatasetDict, `save(table)` a single Dataset."""
    import datasets

    datasets.disable_progress_bars()

    def save_tables(single: pa.Table | None = None, **splits: pa.Table) -> Path:
        if single is not None:
            datasets.Dataset(single).save_to_disk(tmp_path / "cache")
        else:
            made = {name: datasets.Dataset(table) for name, table in splits.items()}
            datasets.DatasetDict(made).save_to_disk(tmp_path / "cache")
        return tmp_path / "cache"

    return save_tables


def table(rows: Any, kind: pa.DataType | None = None, name: str = "input_ids") -> pa.Table:
    return pa.table({name: pa.array(rows, type=kind or pa.list_(pa.int64()))})


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int64()),
        pa.list_(pa.int32()),
        pa.list_(pa.uint16()),
        pa.large_list(pa.int64()),
        pa.list_(pa.int64(), 3),
    ],
)
def test_rows_of_a_dataset(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    monkeypatch.setattr(row_sources, "CACHE_BLOCK_ROWS", 4)
    rows = [[1, n, 2] for n in range(11)]
    if not pa.types.is_fixed_size_list(kind):
        rows[6] = [1, 3, 4, 5, 6, 2]
        rows[9] = [9]
    directory = save(train=table(rows, kind), test=table(rows[:2], kind))
    opened = open_cache(directory)
    assert sorted(opened) == ["test", "train"]
    assert rows_of(opened["train"]) == rows
    assert rows_of(opened["test"]) == rows[:2]
    assert places_of(opened["train"])[10] == f"{directory} train row 10"
    assert [name for name, _ in opened["test"].files()] == ["test/data-00000-of-00001.arrow"]


def test_other_columns_shards_and_shuffled_rows(save: Callable[..., Path], tmp_path: Path) -> None:
    import datasets

    rows = [[1, *range(n), 2] for n in range(1, 40)]
    data = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": rows}).shuffle(seed=3)
    expected = data["input_ids"][:]
    data.save_to_disk(tmp_path / "single", num_shards=3)
    (source,) = open_cache(tmp_path / "single").values()
    assert rows_of(source) == expected != rows
    assert len(source.files()) == 3


def test_directories_that_are_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such directory; --input takes what stage 4 saved"):
        open_cache(tmp_path / "nothing")
    with pytest.raises(
        DataError, match=r"neither dataset_dict.json nor state.json .*DatasetDict.save_to_disk wrote"
    ):
        open_cache(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": []}))
    with pytest.raises(DataError, match="holds no splits"):
        open_cache(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=r"datasets cannot read it \(JSONDecodeError"):
        open_cache(tmp_path)


def test_a_split_name_stays_inside_the_output_directory(save: Callable[..., Path]) -> None:
    directory = save(train=table([[1, 2]]))
    shutil.copytree(directory, directory / "nested" / "train")
    shutil.copytree(directory / "train", directory / "nested" / "evil")
    (directory / "dataset_dict.json").write_text(json.dumps({"splits": ["nested/evil"]}))
    with pytest.raises(DataError, match="split name 'nested/evil' cannot be part of a file name"):
        open_cache(directory)


def test_a_truncated_arrow_file(save: Callable[..., Path]) -> None:
    directory = save(train=table([[1, 2]] * 1000))
    (arrow,) = (directory / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:700])
    with pytest.raises(DataError, match="cache: datasets cannot read it"):
        open_cache(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table([[1, 2]], name="ids"), "train: no column 'input_ids', only ids"),
        (table([]), "train: holds no rows, and an empty store cannot be trained on; fill"),
        (table(["1 2"], pa.string()), "'input_ids' is string; a row is a list of integer ids"),
        (table([[1.0, 2.0]], pa.list_(pa.float64())), "is list<.*double>; a row is a list of integer ids"),
        (table([5], pa.int64()), "'input_ids' is int64"),
        (table([[1, 2]] * 6 + [[]]), "train row 6: holds no ids"),
        (table([[1, 2]] * 5 + [None]), "train row 5: is null"),
        (table([[1, 2]] * 5 + [[1, 4, 5, None], [1, 2]]), "train row 5: holds a null"),
    ],
)
def test_datasets_that_hold_no_rows_of_ids(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, content: pa.Table, message: str
) -> None:
    monkeypatch.setattr(row_sources, "CACHE_BLOCK_ROWS", 4)
    with pytest.raises(DataError, match=message):
        rows_of(open_cache(save(train=content))["train"])


# --- samples and hashes


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=10))
def test_samples_are_cut_at_every_bos(rows: list[list[int]]) -> None:
    expected, without_bos = [], 0
    for row in rows:
        samples: list[list[int]] = []
        for token in row:
            if token == 1 or not samples:
                samples.append([])
            samples[-1].append(token)
        expected.append([len(sample) for sample in samples])
        without_bos += row[0] != 1
    cuts = cut_samples(np.concatenate(rows), np.array([len(row) for row in rows]), bos_id=1)
    assert cuts.sample_lengths.tolist() == [length for row in expected for length in row]
    assert cuts.samples_per_row.tolist() == [len(row) for row in expected]
    assert cuts.rows_without_bos == without_bos


def test_hashes_of_the_sources(tmp_path: Path) -> None:
    content = b"abc" * 10**6
    (tmp_path / "a").write_bytes(content)
    with SourceHasher([("name", tmp_path / "a")]) as hasher:
        (found,) = hasher.result()
    assert found == SourceFile("name", 3 * 10**6, f"xxh128:{xxhash.xxh3_128(content).hexdigest()}")
    assert xxhash.xxh3_128(b"abc").hexdigest() == "06b05ab6733a618578af5f94892f3950"  # as xxh128sum prints it
    with SourceHasher([("gone", tmp_path / "b")]) as hasher, pytest.raises(DataError, match="b: cannot read"):
        hasher.result()
