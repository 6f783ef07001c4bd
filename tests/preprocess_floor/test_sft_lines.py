"""`ids|labels` lines against a plain Python parser, and every damaged line by file and number."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess import sft_lines, text_lines
from usdm_megatron.preprocess.samples import SampleBlock
from usdm_megatron.preprocess.sft_lines import SftLinesSource
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=200, unit_count=50)  # 253 ids: -100 and the id 100 are both there
Sample = tuple[list[int], list[int]]  # ids, loss mask


def make(path: Path, seq_length: int = 1000) -> list[SampleBlock]:
    source = SftLinesSource([path], VOCABULARY, seq_length)
    return [source.make(part) for part in source.parts()]


def samples_of(blocks: list[SampleBlock]) -> list[Sample]:
    found: list[Sample] = []
    for block in blocks:
        assert block.loss_mask is not None
        assert len(block.tokens) == len(block.loss_mask) == block.lengths.sum()
        assert (block.tokens.dtype, block.loss_mask.dtype) == (np.int32, np.uint8)
        assert len(block.lengths) == len(block.utterances) == len(block.groups)
        ends = np.cumsum(block.lengths)
        found += [
            (block.tokens[end - length : end].tolist(), block.loss_mask[end - length : end].tolist())
            for end, length in zip(ends, block.lengths, strict=True)
        ]
    return found


def plain_parse(content: bytes) -> list[Sample]:
    """A line at a time, in plain Python; a `ValueError` for anything that is no `ids|labels` line."""
    found = []
    for line in content.decode("ascii").removesuffix("\n").split("\n"):
        id_words, label_words = (re.findall(r"[^ \t\r]+", half) for half in line.split("|"))
        if not all(word.isdecimal() for word in id_words):
            raise ValueError(id_words)
        if not all(word.isdecimal() or word == "-100" for word in label_words):
            raise ValueError(label_words)
        ids, labels = [int(word) for word in id_words], [int(word) for word in label_words]
        if not ids or any(label not in (-100, i) for i, label in zip(ids, labels, strict=True)):
            raise ValueError(labels)
        if max(ids) >= VOCABULARY.size:
            raise ValueError(ids)
        found.append((ids, [int(label != -100) for label in labels]))
    return found


def line_of(sample: Sample) -> str:
    ids, mask = sample
    labels = [i if target else -100 for i, target in zip(ids, mask, strict=True)]
    return " ".join(map(str, ids)) + "|" + " ".join(map(str, labels))


samples = st.lists(
    st.lists(st.tuples(st.integers(0, VOCABULARY.size - 1), st.integers(0, 1)), min_size=1, max_size=12).map(
        lambda pairs: ([i for i, _ in pairs], [target for _, target in pairs])
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(written=samples, part_bytes=st.integers(1, 60), chunk_bytes=st.integers(1, 60), last=st.booleans())
def test_samples_as_written(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[Sample],
    part_bytes: int,
    chunk_bytes: int,
    last: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "sft.txt"
    path.write_text("\n".join(map(line_of, written)) + "\n" * last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(
            sft_lines, "line_parts", lambda p, h: text_lines.line_parts(p, h, part_bytes=part_bytes)
        )
        blocks = make(path)
    assert samples_of(blocks) == written
    assert sum(block.notices.get("samples_without_target", 0) for block in blocks) == sum(
        not any(mask) for _, mask in written
    )
    assert sum(block.notices.get("samples_without_leading_bos", 0) for block in blocks) == sum(
        ids[0] != VOCABULARY.bos_id for ids, _ in written
    )


@st.composite
def mutated_lines(draw: st.DrawFn) -> bytes:
    content = "\n".join(map(line_of, draw(samples))).encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        put = draw(st.text("0123456789-| \n\t", max_size=4).map(str.encode) | st.binary(max_size=3))
        content = content[:at] + put + content[at + draw(st.integers(0, 4)) :]
    return content or b"\n"


@settings(max_examples=500, deadline=None)
@given(content=mutated_lines())
def test_any_bytes_are_what_plain_python_reads_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.txt"
    path.write_bytes(content)
    try:
        expected = plain_parse(content)
    except ValueError:
        with pytest.raises(DataError, match=r"mutated.txt line \d+: "):
            make(path)
    else:
        assert samples_of(make(path)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1 5 6|-100 5", "line 2: 3 ids, but 2 labels; every id has one"),
        (b"1 5|-100 5 6", "line 2: 2 ids, but 3 labels"),
        (b"1 5 6|-100 6 6", "line 2: label 6 at position 1, where the id is 5; a label is -100 or the id at"),
        (b"1 5 6|-100 -5 6", "line 2: '-5' is no label; labels are ids and -100"),
        (b"1 5 6|-100 -1000 6", "line 2: '-1000' is no label"),
        (b"1 5 6|-100 5-100 6", "line 2: '5-100' is no label"),
        (b"1 5 6|-100 --100 6", "line 2: '--100' is no label"),
        (b"1 5 6|-100 - 6", "line 2: '-' is no label"),
        (b"1 5 6|-100 -10", "line 2: '-10' is no label"),
        (b"1 5 6|-100 +5 6", r"line 2: '\+5' is no label"),
        (b"1 5 6|-100 nan 6", "line 2: 'nan' is no label"),
        (b"1 -100 6|-100 5 6", "line 2: '-100' is no token id"),
        (b"1 x 6|-100 5 6", "line 2: 'x' is no token id"),
        (b"", r"line 2: the line is empty; a line is 'ids\|labels', both space separated numbers"),
        (b"  \r", "line 2: the line is empty"),
        (b"1 5 6", r"line 2: the line has 0 '\|'"),
        (b"1 5|5|6", r"line 2: the line has 2 '\|'"),
        (b"|", "line 2: the line holds no ids; every line is a sample, 'ids.labels'"),
        (b"|5", "line 2: the line holds no ids"),
        (b"5|", "line 2: the line holds no labels; every line is a sample"),
        (b"1 253 6|-100 253 6", r"line 2: holds id 253, outside the vocabulary of 253 ids \(0 to 252\)"),
        (b"1 4294967301 6|-100 -100 6", "line 2: holds id 4294967301, outside the vocabulary"),
        (b"1 5 6|-100 4294967301 6", "line 2: label 4294967301 at position 1, where the id is 5"),
        (b"1 99999999999999999999|-100 -100", "line 2: holds id 9223372036854775807, outside"),
        ("1 ５ 6|-100 5 6".encode(), "line 2: '５' is no token id"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_damaged_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(text_lines, "_CHUNK_BYTES", chunk_bytes)
    (tmp_path / "bad.txt").write_bytes(b"1 7 8|-100 7 8\n" + line + b"\n1 7 8|-100 7 8\n")
    with pytest.raises(DataError, match=f"bad.txt {message}"):
        make(tmp_path / "bad.txt")


def test_long_numbers_beside_labels(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("1 0000000100 000000005|-100 -100 00000000005\n")
    assert samples_of(make(tmp_path / "p.txt")) == [([1, 100, 5], [0, 0, 1])]


def test_an_over_long_sample_is_rejected_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("1 5|-100 5\n1 6 7 8|-100 -100 7 8\n1 9|-100 9\n")
    blocks = make(tmp_path / "p.txt", seq_length=3)
    assert samples_of(blocks) == [([1, 5], [0, 1]), ([1, 9], [0, 1])]
    ((rejection,),) = [block.rejections for block in blocks]
    assert (rejection.where, rejection.reason, rejection.detail) == (
        f"{tmp_path / 'p.txt'} line 2",
        "over_long",
        "4 tokens, --seq-length 3",
    )


def test_only_equal_samples_are_one_utterance(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("1 5|-100 5\n1 6|-100 6\n1 5|-100 -100\n1 5 6|-100 5 6\n")
    (block,) = make(tmp_path / "p.txt")
    first, second, third, fourth = block.utterances.tolist()
    assert first == third
    assert len({first, second, fourth}) == 3


def test_files_in_natural_order_and_pickled(tmp_path: Path) -> None:
    for number in (10, 9):
        (tmp_path / f"train{number}.txt").write_text(f"1 {number}|-100 {number}\n")
    source = SftLinesSource([tmp_path / "train10.txt", tmp_path / "train9.txt"], VOCABULARY, 10)
    assert [name for name, _ in source.files()] == ["train9.txt", "train10.txt"]
    source, parts = pickle.loads(pickle.dumps((source, source.parts())))
    assert samples_of([source.make(part) for part in parts]) == [([1, 9], [0, 1]), ([1, 10], [0, 1])]


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"")
    with pytest.raises(DataError, match="p.txt: the file is empty; leave it out or write it again"):
        make(tmp_path / "p.txt")
    with pytest.raises(DataError, match="no file given; it takes files of 'ids.labels' lines"):
        SftLinesSource([], VOCABULARY, 10)
