"""Samples from the original's files: stage 2 (`data_epoch{e}.txt`), and packed rows that are packed again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.id_samples import (
    checked_ids,
    content_hashes,
    count_without_bos,
    fitting_samples,
)
from usdm_megatron.preprocess.rows import RowSource, cut_samples
from usdm_megatron.preprocess.samples import SampleBlock, utterance_hash
from usdm_megatron.preprocess.text_lines import (
    LinePart,
    LinePlace,
    input_files,
    line_parts,
    parse_id_part,
    read_lines,
)
from usdm_megatron.vocab import Vocabulary

SAMPLES_WITHOUT_LENGTHS = "samples_without_length_file"
ROWS_WITHOUT_BOS = "rows_without_leading_bos"
_EPOCH_FILE = re.compile(r"data_epoch[0-9]+\.txt")


@dataclass(frozen=True)
class SamplePart:
    """Whole lines of a `data_epoch{e}.txt`."""

    lines: LinePart
    first_line: int  # of the file, counted from 0
    corpus: int  # the run of stage 2 that the file is an epoch of
    epoch: int  # counted from 0
    lengths: np.ndarray | None = field(compare=False)  # int64, what the `.json` says of these lines


class SampleFilesSource:
    """`data_epoch{e}.txt` of stage 2: a sample a line; `data_epoch{e}.json` beside it lists their lengths.

    Stage 2 writes an utterance into every epoch or into none, so that line i of all epochs in a
    directory is the same utterance: files of unequal length are a `DataError`. A file with another
    name is a corpus of its own, of one epoch. A missing `.json` is counted, one that says otherwise is
    a `DataError`. Samples longer than `seq_length` tokens are rejections.
    """

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary, seq_length: int) -> None:
        self._paths = input_files(paths, "the data_epoch*.txt files of stage 2")
        self._vocabulary = vocabulary
        self._seq_length = seq_length

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._paths]

    def parts(self) -> list[SamplePart]:
        """Reads every file once, to count its lines."""
        problems: list[str] = []
        parts: list[SamplePart] = []
        for number, corpus in enumerate(_corpora(self._paths)):
            line_counts = []
            for epoch, path in enumerate(corpus):
                found, problem = _file_parts(path, number, epoch)
                parts += found
                problems += problem
                line_counts.append(found[-1].first_line + line_count(found[-1].lines))
            if len(set(line_counts)) > 1:
                counted = ", ".join(f"{p.name} {n}" for p, n in zip(corpus, line_counts, strict=True))
                problems.append(
                    f"{corpus[0].parent}: the epochs have different numbers of samples ({counted}); stage 2 "
                    "gives every utterance a line in every epoch: pass epochs of one run of stage 2, or call "
                    "files that are none otherwise than data_epoch*.txt"
                )
        if problems:
            raise DataError(*problems)
        return parts

    def make(self, part: SamplePart) -> SampleBlock:
        place = LinePlace(part.lines.path, part.lines.start)
        lines = parse_id_part(part.lines, "a sample")
        tokens = checked_ids(lines.numbers, lines.lengths, place, self._vocabulary)
        notices = count_without_bos(tokens, lines.lengths, self._vocabulary.bos_id)
        if part.lengths is None:
            notices[SAMPLES_WITHOUT_LENGTHS] = len(lines.lengths)
        else:
            _compare(lines.lengths, part, place)
        numbers = range(part.first_line, part.first_line + len(lines.lengths))
        block = SampleBlock(
            tokens=tokens,
            lengths=lines.lengths,
            utterances=np.array([utterance_hash(f"{part.corpus}:{n}") for n in numbers], dtype=np.uint64),
            groups=np.full(len(numbers), part.epoch, dtype=np.int32),
            notices=notices,
        )
        return fitting_samples(block, self._seq_length, place)


class RepackSource:
    """Packed rows cut at every bos into samples that are packed anew (`--repack`).

    Whose epoch a sample is has been lost with the packing: all are one group, and equal samples count
    as one utterance. Samples longer than `seq_length` tokens are rejections; rows may be longer.
    """

    def __init__(self, rows: RowSource, vocabulary: Vocabulary, seq_length: int) -> None:
        self._rows = rows
        self._vocabulary = vocabulary
        self._seq_length = seq_length

    def files(self) -> list[tuple[str, Path]]:
        return self._rows.files()

    def parts(self) -> Sequence[Any]:
        return self._rows.parts()

    def make(self, part: Any) -> SampleBlock:
        rows = self._rows.read(part)
        tokens = checked_ids(rows.tokens, rows.row_lengths, rows.place, self._vocabulary)
        cuts = cut_samples(tokens, rows.row_lengths, self._vocabulary.bos_id)
        row_ends = np.cumsum(cuts.samples_per_row)

        def place(sample: int) -> str:
            row = int(np.searchsorted(row_ends, sample, side="right"))
            within = sample - int(row_ends[row] - cuts.samples_per_row[row])
            return f"{rows.place(row)} sample {within + 1}"

        block = SampleBlock(
            tokens=tokens,
            lengths=cuts.sample_lengths,
            utterances=content_hashes(tokens, cuts.sample_lengths),
            groups=np.zeros(len(cuts.sample_lengths), dtype=np.int32),
            notices={ROWS_WITHOUT_BOS: cuts.rows_without_bos} if cuts.rows_without_bos else {},
        )
        return fitting_samples(block, self._seq_length, place)


def line_count(part: LinePart) -> int:
    return read_lines(part).count(b"\n")


def _corpora(paths: Sequence[Path]) -> list[list[Path]]:
    """Files of one run of stage 2 together, in the order of its epochs."""
    corpora: dict[Path, list[Path]] = {}
    for path in paths:
        is_epoch = _EPOCH_FILE.fullmatch(path.name) is not None
        corpora.setdefault(path.parent.resolve() if is_epoch else path, []).append(path)
    return list(corpora.values())


def _file_parts(path: Path, corpus: int, epoch: int) -> tuple[list[SamplePart], list[str]]:
    """The parts of a file with what its `.json` says of them, and what is wrong with it."""
    lengths, problems = _recorded_lengths(path.with_suffix(".json"))
    parts = []
    first_line = 0
    for lines in line_parts(path, "the ids of one sample"):
        count = line_count(lines)
        expected = None if lengths is None else lengths[first_line : first_line + count]
        parts.append(SamplePart(lines, first_line, corpus, epoch, expected))
        first_line += count
    if lengths is not None and len(lengths) != first_line:
        problems.append(
            f"{path}: {first_line} samples, but {path.stem}.json lists {len(lengths)} lengths; "
            "one of them is incomplete: write both again with stage 2"
        )
    return parts, problems


def _recorded_lengths(path: Path) -> tuple[np.ndarray | None, list[str]]:
    """The list of lengths in a `data_epoch{e}.json`; None where there is no such file, or it is wrong."""
    if not path.is_file():
        return None, []
    try:
        lengths = np.array(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        return None, [f"{path}: is no JSON list of lengths ({error}); write it again with stage 2"]
    if lengths.ndim != 1 or (lengths.dtype.kind != "i" and len(lengths)):
        return None, [f"{path}: must hold a list of lengths, whole numbers; write it again with stage 2"]
    return lengths, []


def _compare(lengths: np.ndarray, part: SamplePart, place: LinePlace) -> None:
    if part.lengths is None or len(part.lengths) != len(lengths):
        raise DataError(f"{part.lines.path}: changed while it was read; start again when it is complete")
    wrong = np.flatnonzero(lengths != part.lengths)
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{place(at)}: holds {lengths[at]} ids, but {part.lines.path.stem}.json says {part.lengths[at]}; "
            "the two are not of one run: write both again with stage 2"
        )
