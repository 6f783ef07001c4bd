"""One row of a store as a person reads it: its samples, and in them runs of text, units and marks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from usdm_megatron.data.token_runs import read_rows
from usdm_megatron.data.token_store import StoreSummary, TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.file_reading import read_json_object
from usdm_megatron.tokenizer.identity import tokenizer_sha256, tokenizer_size
from usdm_megatron.tokenizer.sentencepiece_bpe import tokenizer_json_from_sentencepiece
from usdm_megatron.tokenizer.text_encoder import extended_tokenizer
from usdm_megatron.vocab import TargetKind, Vocabulary

_MOST_NUMBERS = 14  # of a run, on its line
_MOST_CHARACTERS = 90


@dataclass(frozen=True)
class ExampleRun:
    """Tokens of one kind, all targets or none. `numbers` are ids; of units their numbers, from 0."""

    kind: str  # TargetKind.label
    numbers: tuple[int, ...]
    is_target: bool | None  # None: the store has no loss mask
    text: str | None  # None without a tokenizer, and for what is no text


@dataclass(frozen=True)
class ExampleSample:
    """A sample of the row; lengths in tokens."""

    length: int
    targets: int | None
    runs: tuple[ExampleRun, ...]


@dataclass(frozen=True)
class ExampleRow:
    """Row `row` of a store."""

    row: int
    samples: tuple[ExampleSample, ...]


class TextDecoder:
    """Text of text ids, by the tokenizer that a store was made with, plain or extended.

    Raises `DataError` for another one: by its hash where the store records one, else by its size.
    """

    def __init__(self, directory: Path, summary: StoreSummary) -> None:
        from tokenizers import Tokenizer

        _check_tokenizer(directory, summary)
        try:
            if (directory / "tokenizer.json").is_file():
                content = read_json_object(directory / "tokenizer.json")
            else:
                content = tokenizer_json_from_sentencepiece(directory / "tokenizer.model")
            self._tokenizer = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise DataError(f"{directory}: cannot be read as a tokenizer ({error}); save it again") from error

    def decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        # A decoder strips the space that a text begins with; of a lone `▁` nothing would be left.
        return text or "".join(self._tokenizer.id_to_token(token_id) or "" for token_id in ids)


def read_example(store: TokenStore, row_id: int, decoder: TextDecoder | None = None) -> ExampleRow:
    """Row `row_id` in samples and runs; `DataError` outside the store, and for ids outside the vocabulary."""
    if not 0 <= row_id < store.rows:
        raise DataError(f"--row is {row_id}; {store.prefix} has the rows 0 to {store.rows - 1}")
    row = read_rows(store, row_id, row_id + 1)
    samples = []
    for start, length in zip(row.sample_starts().tolist(), row.sample_lengths.tolist(), strict=True):
        span = slice(start, start + length)
        mask = None if row.loss_mask is None else row.loss_mask[span]
        runs = tuple(_runs(row.tokens[span], mask, store.summary.vocabulary, decoder))
        samples.append(ExampleSample(length, None if mask is None else int(mask.sum()), runs))
    return ExampleRow(row_id, tuple(samples))


def describe_example(example: ExampleRow, most_samples: int | None = None) -> list[str]:
    """Lines for a person, a run each, abbreviated; of the first `most_samples` samples where given."""
    tokens = sum(sample.length for sample in example.samples)
    lines = [f"  row {example.row}: {len(example.samples):,} samples, {tokens:,} tokens"]
    shown = example.samples[:most_samples]
    for number, sample in enumerate(shown):
        targets = "" if sample.targets is None else f", {sample.targets:,} targets (*)"
        lines.append(f"    sample {number}: {sample.length:,} tokens{targets}")
        lines += [f"    {'*' if run.is_target else ' '} {_describe_run(run)}" for run in sample.runs]
    if left_out := len(example.samples) - len(shown):
        lines.append(f"    … {left_out:,} more samples: --row {example.row} shows them")
    return lines


def _runs(
    ids: np.ndarray, mask: np.ndarray | None, vocabulary: Vocabulary, decoder: TextDecoder | None
) -> Iterator[ExampleRun]:
    kinds = vocabulary.kind_of_id()[ids]
    changes = kinds[1:] != kinds[:-1]
    if mask is not None:
        changes |= mask[1:] != mask[:-1]
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        kind = TargetKind(kinds[start])
        numbers = ids[start:end].tolist()
        is_text = kind is TargetKind.TEXT
        if kind is TargetKind.UNIT:
            numbers = [number - vocabulary.first_unit_id for number in numbers]
        yield ExampleRun(
            kind=kind.label,
            numbers=tuple(numbers),
            is_target=None if mask is None else bool(mask[start]),
            text=decoder.decode(numbers) if decoder and is_text else None,
        )


def _describe_run(run: ExampleRun) -> str:
    if run.text is not None:
        shown = run.text[:_MOST_CHARACTERS]
        content = repr(shown) + (" …" if len(shown) < len(run.text) else "")
    elif run.kind in (TargetKind.TEXT.label, TargetKind.UNIT.label):
        content = " ".join(map(str, run.numbers[:_MOST_NUMBERS]))
        content += " …" if len(run.numbers) > _MOST_NUMBERS else ""
    else:
        return run.kind if len(run.numbers) == 1 else f"{run.kind:<11}{len(run.numbers):>6,}"
    return f"{run.kind:<11}{len(run.numbers):>6,}  {content}"


def _check_tokenizer(directory: Path, summary: StoreSummary) -> None:
    recorded = summary.tokenizer_sha256
    if recorded == tokenizer_sha256(directory):
        return
    if recorded is None:
        size, sizes = tokenizer_size(directory), (summary.vocabulary.text_size, summary.vocabulary.size)
        if size not in sizes:
            raise DataError(
                f"{directory}: the tokenizer has {size} ids, the store's vocabulary {sizes[1]}, of which "
                f"{sizes[0]} are text; pass the tokenizer that the ids were made with"
            )
    elif recorded != extended_tokenizer(directory).sha256:
        raise DataError(
            f"{directory}: is not the tokenizer that the store was made with, neither as it is nor extended "
            f"(sha256 {recorded}); pass that one"
        )
