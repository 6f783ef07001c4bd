"""Stage 2 files and packed rows as samples: lengths against their JSON, utterances over epochs, repacking."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess import row_sources, sample_files, text_lines
from usdm_megatron.preprocess.row_sources import PackedTextSource, open_cache
from usdm_megatron.preprocess.sample_files import RepackSource, SampleFilesSource
from usdm_megatron.preprocess.samples import SampleBlock
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=40, unit_count=7)  # 50 ids


def write_epoch(directory: Path, epoch: int, samples: list[list[int]], lengths: Any = None) -> Path:
    """As stage 2 writes them: no line end at the end, the JSON indented."""
    path = directory / f"data_epoch{epoch}.txt"
    path.write_text("\n".join(" ".join(map(str, sample)) for sample in samples))
    path.with_suffix(".json").write_text(
        json.dumps([len(sample) for sample in samples] if lengths is None else lengths, indent=4)
    )
    return path


def source_of(*paths: Path, seq_length: int = 1000) -> SampleFilesSource:
    return SampleFilesSource(paths, VOCABULARY, seq_length)


def make_all(source: Any) -> list[SampleBlock]:
    return [source.make(part) for part in source.parts()]


def samples_of(blocks: list[SampleBlock]) -> list[list[int]]:
    found = []
    for block in blocks:
        assert block.loss_mask is None
        assert block.tokens.dtype == np.int32
        assert len(block.tokens) == block.lengths.sum()
        ends = np.cumsum(block.lengths)
        found += [
            block.tokens[end - length : end].tolist() for end, length in zip(ends, block.lengths, strict=True)
        ]
    return found


def column(blocks: list[SampleBlock], name: str) -> list[int]:
    return [value for block in blocks for value in getattr(block, name).tolist()]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sample_files, "line_parts", lambda path, holds: text_lines.line_parts(path, holds, part_bytes=20)
    )


# --- stage 2


def test_epochs_in_order_and_the_utterance_of_a_line(tmp_path: Path, small_parts: None) -> None:
    epochs = {number: [[1, *range(3, 3 + line % 5), number, 2] for line in range(9)] for number in (10, 2, 1)}
    paths = [write_epoch(tmp_path, number, samples) for number, samples in epochs.items()]
    source = source_of(*paths)
    assert [name for name, _ in source.files()] == [f"data_epoch{n}.txt" for n in (1, 2, 10)]
    parts = source.parts()
    assert len(parts) > 6
    blocks = make_all(source)
    assert samples_of(blocks) == epochs[1] + epochs[2] + epochs[10]
    assert column(blocks, "groups") == [0] * 9 + [1] * 9 + [2] * 9
    utterances = column(blocks, "utterances")
    assert utterances[:9] == utterances[9:18] == utterances[18:]
    assert len(set(utterances)) == 9
    assert all(block.notices == {} for block in blocks)

    again, parts = pickle.loads(pickle.dumps((source, parts)))
    made = {number: again.make(parts[number]) for number in reversed(range(len(parts)))}
    assert samples_of([made[number] for number in range(len(parts))]) == samples_of(blocks)


def test_the_same_bytes_elsewhere_are_the_same_utterances(tmp_path: Path) -> None:
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        found.append(
            column(make_all(source_of(write_epoch(tmp_path / name, 1, [[1, 5], [1, 6]]))), "utterances")
        )
    assert found[0] == found[1]


def test_directories_and_other_names_are_other_corpora(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [
        write_epoch(tmp_path / "a", 1, [[1, 5], [1, 6]]),
        write_epoch(tmp_path / "a", 2, [[1, 7], [1, 8]]),
        write_epoch(tmp_path / "b", 1, [[1, 9]]),
    ]
    (tmp_path / "a" / "more.txt").write_text("1 10\n1 11\n1 12\n")
    blocks = make_all(source_of(*paths, tmp_path / "a" / "more.txt"))
    assert samples_of(blocks) == [[1, 5], [1, 6], [1, 7], [1, 8], [1, 10], [1, 11], [1, 12], [1, 9]]
    assert column(blocks, "groups") == [0, 0, 1, 1, 0, 0, 0, 0]
    utterances = column(blocks, "utterances")
    assert utterances[:2] == utterances[2:4]
    assert len(set(utterances)) == 2 + 3 + 1
    assert sum(block.notices.get("samples_without_length_file", 0) for block in blocks) == 3


def test_over_long_samples_and_samples_without_bos_are_counted(tmp_path: Path) -> None:
    path = write_epoch(tmp_path, 1, [[1, 5, 2], [1, 3, 4, 5, 2], [7, 2]])
    (block,) = make_all(source_of(path, seq_length=4))
    assert samples_of([block]) == [[1, 5, 2], [7, 2]]
    (rejection,) = block.rejections
    assert (rejection.where, rejection.reason) == (f"{path} line 2", "over_long")
    assert rejection.detail == "5 tokens, --seq-length 4"
    assert block.notices == {"samples_without_leading_bos": 1}
    assert block.utterances.tolist() == [
        column(make_all(source_of(path)), "utterances")[line] for line in (0, 2)
    ]


def test_lengths_are_compared_by_line(tmp_path: Path, small_parts: None) -> None:
    samples = [[1, *range(3, 10), 2]] * 6
    path = write_epoch(tmp_path, 1, samples, lengths=[9, 9, 9, 9, 8, 9])
    with pytest.raises(DataError, match=r"data_epoch1.txt line 5: holds 9 ids, but data_epoch1.json says 8"):
        make_all(source_of(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[2, 2, 2]", r"data_epoch1.txt: 2 samples, but data_epoch1.json lists 3 lengths; one of them is"),
        (b"[]", "lists 0 lengths"),
        (b"[2, 2", "data_epoch1.json: is no JSON list of lengths"),
        (b"\xff", "is no JSON list of lengths"),
        (b"[" * 100_000, "is no JSON list of lengths"),
        (b"[2, [3]]", "is no JSON list of lengths"),
        (b"{}", "must hold a list of lengths, whole numbers"),
        (b"[2.0, 2.0]", "must hold a list of lengths, whole numbers"),
        (b'["2", "2"]', "must hold a list of lengths, whole numbers"),
        (b"[[2], [2]]", "must hold a list of lengths, whole numbers"),
        (b"[2, 99999999999999999999999]", "must hold a list of lengths, whole numbers"),
        (b"[2, null]", "must hold a list of lengths, whole numbers"),
        (b"NaN", "must hold a list of lengths, whole numbers"),
    ],
)
def test_lengths_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_epoch(tmp_path, 1, [[1, 2], [1, 2]])
    path.with_suffix(".json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        source_of(path).parts()


def test_problems_of_several_epochs_come_at_once(tmp_path: Path) -> None:
    paths = [
        write_epoch(tmp_path, 1, [[1, 2], [1, 2]]),
        write_epoch(tmp_path, 2, [[1, 2]], lengths=[2, 2]),
        write_epoch(tmp_path, 3, [[1, 2]], lengths={}),
    ]
    with pytest.raises(DataError) as caught:
        source_of(*paths).parts()
    assert [problem.split(": ")[0].rsplit("/", 1)[1] for problem in caught.value.problems] == [
        "data_epoch2.txt",
        "data_epoch3.json",
        tmp_path.name,
    ]
    assert "data_epoch1.txt 2, data_epoch2.txt 1, data_epoch3.txt 1" in caught.value.problems[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data_epoch1.txt: the file is empty"),
        (b"1 5\n\n1 6", "line 2: the line holds no ids; every line is a sample: remove it"),
        (b"1 5\n1 50", r"line 2: holds id 50, outside the vocabulary of 50 ids \(0 to 49\)"),
        (b"1 5\n1 x", "line 2: 'x' is no token id"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data_epoch1.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        make_all(source_of(tmp_path / "data_epoch1.txt"))


def test_a_file_that_changes_between_counting_and_reading(tmp_path: Path) -> None:
    path = write_epoch(tmp_path, 1, [[1, 5, 2], [1, 6, 2]])
    source = source_of(path)
    parts = source.parts()
    path.write_text("1 5\n1 6 2")
    with pytest.raises(DataError, match="became shorter while it was read"):
        source.make(parts[0])
    path.write_text("1 5 2 1 6 2")
    with pytest.raises(DataError, match="changed while it was read"):
        source.make(parts[0])


@settings(max_examples=300, deadline=None)
@given(text=st.binary(max_size=30), lengths=st.none() | st.binary(max_size=12))
def test_any_bytes_give_samples_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, lengths: bytes | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "data_epoch1.txt"
    path.write_bytes(text)
    path.with_suffix(".json").unlink(missing_ok=True)
    if lengths is not None:
        path.with_suffix(".json").write_bytes(lengths)
    try:
        blocks = make_all(source_of(path))
    except DataError:
        return
    assert samples_of(blocks) == [
        [int(word) for word in line.split()] for line in text.removesuffix(b"\n").split(b"\n")
    ]


# --- packed rows


def write_text(directory: Path, rows: list[list[int]]) -> PackedTextSource:
    (directory / "part0.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    return PackedTextSource([directory / "part0.txt"])


def write_parquet(directory: Path, rows: list[list[int]]) -> Any:
    pq.write_table(pa.table({"input_ids": rows}), directory / "rows.parquet", row_group_size=3)
    return open_cache(directory / "rows.parquet")[""]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=10))
@pytest.mark.parametrize("write", [write_text, write_parquet])
def test_rows_are_cut_at_bos_wherever_they_come_from(
    tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Any], rows: list[list[int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_sources, "TEXT_BLOCK_BYTES", 11)
        source = RepackSource(write(tmp_path_factory.getbasetemp(), rows), VOCABULARY, seq_length=5)
        blocks = make_all(source)
    samples: list[list[int]] = []
    for row in rows:
        samples.append([])
        for token in row:
            if token == VOCABULARY.bos_id and samples[-1]:
                samples.append([])
            samples[-1].append(token)
    assert samples_of(blocks) == [sample for sample in samples if len(sample) <= 5]
    assert sum(len(block.rejections) for block in blocks) == sum(len(sample) > 5 for sample in samples)
    assert sum(block.notices.get("rows_without_leading_bos", 0) for block in blocks) == sum(
        row[0] != VOCABULARY.bos_id for row in rows
    )
    by_content: dict[int, tuple[int, ...]] = {}
    for sample, utterance in zip(samples_of(blocks), column(blocks, "utterances"), strict=True):
        assert by_content.setdefault(utterance, tuple(sample)) == tuple(sample)
    assert len(by_content) == len({tuple(sample) for sample in samples if len(sample) <= 5})


def test_an_over_long_sample_is_named_by_row_and_place(tmp_path: Path) -> None:
    rows = write_text(tmp_path, [[1, 2], [1, 2, 1, 5, 6, 7, 2, 1, 2]])
    (block,) = make_all(RepackSource(rows, VOCABULARY, seq_length=4))
    (rejection,) = block.rejections
    assert rejection.where == f"{tmp_path}/part0.txt line 2 sample 2"
    assert samples_of([block]) == [[1, 2], [1, 2], [1, 2]]


def test_ids_outside_the_vocabulary_are_named_by_row(tmp_path: Path) -> None:
    rows = write_text(tmp_path, [[1, 2, 1, 3], [1, 2, 50]])
    with pytest.raises(DataError, match=r"part0.txt line 2: holds id 50, outside the vocabulary of 50 ids"):
        make_all(RepackSource(rows, VOCABULARY, seq_length=40))
