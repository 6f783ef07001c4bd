"""Samples from the original's fine-tuning files: a line is `ids|labels`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.id_samples import (
    checked_ids,
    content_hashes,
    count_without_bos,
    fitting_samples,
)
from usdm_megatron.preprocess.samples import SampleBlock
from usdm_megatron.preprocess.text_lines import (
    LinePart,
    LinePlace,
    NumberLines,
    input_files,
    line_parts,
    parse_id_lines,
    parse_label_lines,
    read_lines,
    word_around,
)
from usdm_megatron.vocab import Vocabulary

IGNORED_LABEL = -100  # what the original and torch's cross entropy call a token without loss
SAMPLES_WITHOUT_TARGET = "samples_without_target"
_STRAY_BYTE = re.compile(rb"[^0-9 \t\r\n-]")
_WHITE_SPACE = np.isin(np.arange(256), list(b" \t\r\n"))


class SftLinesSource:
    """`ids|labels` lines, both decimal and separated by spaces; a label is -100 or the id at its position.

    Labels are not shifted (the original shifts in the model). The loss mask is 1 where the label is not
    -100. Equal samples count as one utterance. A damaged line is a `DataError` that names it; samples
    longer than `seq_length` tokens are rejections; lines without any label are counted.
    """

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary, seq_length: int) -> None:
        self._paths = input_files(paths, "files of 'ids|labels' lines")
        self._vocabulary = vocabulary
        self._seq_length = seq_length

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._paths]

    def parts(self) -> list[LinePart]:
        return [part for path in self._paths for part in line_parts(path, "the ids and labels of a sample")]

    def make(self, part: LinePart) -> SampleBlock:
        place = LinePlace(part.path, part.start)
        id_text, label_text = _halves(read_lines(part), place)
        ids = parse_id_lines(id_text, place, "a sample, 'ids|labels'")
        labels = _parse_labels(label_text, place)
        _check_counts(ids.lengths, labels.lengths, place)
        is_target = labels.numbers != IGNORED_LABEL
        _check_labels(ids, labels.numbers, is_target, place)
        tokens = checked_ids(ids.numbers, ids.lengths, place, self._vocabulary)
        notices = count_without_bos(tokens, ids.lengths, self._vocabulary.bos_id)
        targets = np.add.reduceat(is_target, np.cumsum(ids.lengths) - ids.lengths, dtype=np.int64)
        if not targets.all():
            notices[SAMPLES_WITHOUT_TARGET] = int(np.count_nonzero(targets == 0))
        block = SampleBlock(
            tokens=tokens,
            lengths=ids.lengths,
            utterances=content_hashes(tokens, ids.lengths),
            groups=np.zeros(len(ids.lengths), dtype=np.int32),
            loss_mask=is_target.astype(np.uint8),
            notices=notices,
        )
        return fitting_samples(block, self._seq_length, place)


def _halves(text: bytes, place: LinePlace) -> tuple[bytes, bytes]:
    """What stands before and behind the `|` of every line, both as lines."""
    ids, labels = [], []
    for number, line in enumerate(text.split(b"\n")[:-1]):
        before, bar, behind = line.partition(b"|")
        if not bar or b"|" in behind:
            found = "is empty" if not line.strip() else f"has {line.count(b'|')} '|'"
            raise DataError(
                f"{place(number)}: the line {found}; a line is 'ids|labels', both space separated numbers"
            )
        ids.append(before)
        labels.append(behind)
    return b"\n".join([*ids, b""]), b"\n".join([*labels, b""])


def _parse_labels(text: bytes, place: LinePlace) -> NumberLines:
    """Parse lines of decimal ids and -100; anything else is a `DataError`."""
    characters = np.frombuffer(text, dtype=np.uint8)
    stray = _STRAY_BYTE.search(text) if text.translate(None, b"0123456789- \t\r\n") else None
    at = stray.start() if stray else _misplaced_minus(characters)
    if at is not None:
        line = place(text.count(b"\n", 0, at))
        raise DataError(f"{line}: {word_around(text, at)!r} is no label; labels are ids and -100")
    return parse_label_lines(text, place, "a sample, 'ids|labels'")


def _misplaced_minus(characters: np.ndarray) -> int | None:
    """Where a `-` stands that is not the first character of the word `-100`."""
    minus = np.flatnonzero(characters == ord("-"))
    padded = np.concatenate((characters, np.full(4, ord("\n"), dtype=np.uint8)))
    is_label = (minus == 0) | _WHITE_SPACE[padded[minus - 1]]
    for offset, digit in enumerate(b"100", start=1):
        is_label &= padded[minus + offset] == digit
    is_label &= _WHITE_SPACE[padded[minus + 4]]
    return None if is_label.all() else int(minus[is_label.argmin()])


def _check_counts(id_counts: np.ndarray, label_counts: np.ndarray, place: LinePlace) -> None:
    unequal = np.flatnonzero(id_counts != label_counts)
    if len(unequal):
        at = int(unequal[0])
        raise DataError(
            f"{place(at)}: {id_counts[at]} ids, but {label_counts[at]} labels; every id has one: write the "
            "line again"
        )


def _check_labels(ids: NumberLines, labels: np.ndarray, is_target: np.ndarray, place: LinePlace) -> None:
    wrong = np.flatnonzero(is_target & (labels != ids.numbers))
    if len(wrong):
        at = int(wrong[0])
        line = int(np.searchsorted(np.cumsum(ids.lengths), at, side="right"))
        position = at - int(ids.lengths[:line].sum())
        raise DataError(
            f"{place(line)}: label {labels[at]} at position {position}, where the id is {ids.numbers[at]}; "
            "a label is -100 or the id at its own position (the shift happens in the model)"
        )
