"""What `data.py` preprocesses and reads: the same at every call, speech-like in lengths and ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.vocab import USDM_VOCABULARY

_BLOCK_ROWS = 512
_TEXT_FILES = 4  # `datasets` reads a file in one process
_MEAN_SAMPLE_TOKENS = 600
_SIGMA = 0.75  # of the logarithm of a sample's length
_SHORTEST_SAMPLE = 3


@dataclass(frozen=True)
class Rows:
    """Packed rows as `TokenStoreWriter.append` takes them."""

    tokens: np.ndarray  # int64 [T]
    sample_lengths: np.ndarray  # int64 [samples]
    samples_per_row: np.ndarray  # int64 [R]

    def split(self) -> list[np.ndarray]:
        """The tokens of each row."""
        sample_ends = np.cumsum(self.sample_lengths)
        return np.split(self.tokens, sample_ends[np.cumsum(self.samples_per_row)[:-1] - 1])


def make_rows(seed: int, seq_length: int, rows: int) -> Rows:
    """Rows of whole samples, each bos … eos; nine ids of ten are units, the others text."""
    rng = np.random.default_rng(seed)
    vocabulary = USDM_VOCABULARY
    log_mean = np.log(_MEAN_SAMPLE_TOKENS) - _SIGMA**2 / 2
    lengths: list[int] = []
    samples_per_row = []
    for _ in range(rows):
        room, before = seq_length, len(lengths)
        while room >= _SHORTEST_SAMPLE:
            lengths.append(min(room, _SHORTEST_SAMPLE + int(rng.lognormal(log_mean, _SIGMA))))
            room -= lengths[-1]
        samples_per_row.append(len(lengths) - before)
    sample_lengths = np.array(lengths)
    ends = np.cumsum(sample_lengths)
    units = vocabulary.first_unit_id + rng.integers(0, vocabulary.unit_count, ends[-1])
    text = rng.integers(max(vocabulary.bos_id, vocabulary.eos_id) + 1, vocabulary.text_size, ends[-1])
    tokens = np.where(rng.random(ends[-1]) < 0.9, units, text)
    tokens[ends - sample_lengths] = vocabulary.bos_id
    tokens[ends - 1] = vocabulary.eos_id
    return Rows(tokens, sample_lengths, np.array(samples_per_row))


def _blocks(tokens: int, seq_length: int) -> Iterator[Rows]:
    """Different blocks, of at least `tokens` tokens together."""
    rows = _rows_of_a_block(tokens, seq_length)
    seed = 0
    while tokens > 0:
        yield (block := make_rows(seed, seq_length, rows))
        tokens -= len(block.tokens)
        seed += 1


def _rows_of_a_block(tokens: int, seq_length: int) -> int:
    return max(1, min(_BLOCK_ROWS, tokens // seq_length // _TEXT_FILES))


def write_text(directory: Path, tokens: int, seq_length: int) -> tuple[Path, ...]:
    """`part*.txt` of stage 3."""
    paths = tuple(directory / f"part{number}.txt" for number in range(_TEXT_FILES))
    for number, block in enumerate(_blocks(tokens, seq_length)):
        with paths[number % _TEXT_FILES].open("a") as file:
            file.writelines(" ".join(map(str, row.tolist())) + "\n" for row in block.split())
    return tuple(path for path in paths if path.exists())


def save_dataset(path: Path, tokens: int, seq_length: int) -> None:
    """What stage 4 saves, of one split: lists of int64."""
    import datasets

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for block in _blocks(tokens, seq_length):
            yield from ({"input_ids": row} for row in block.split())

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_generator(rows, cache_dir=str(path.with_name("generated")))
    made.save_to_disk(str(path))


def write_store(prefix: str, tokens: int, seq_length: int) -> None:
    """A store of one block, again and again: making ids takes longer than reading them."""
    block = make_rows(0, seq_length, _rows_of_a_block(tokens, seq_length))
    narrow = block.tokens.astype(np.uint16)
    with TokenStoreWriter(prefix, USDM_VOCABULARY, row_capacity=seq_length) as writer:
        for _ in range(-(-tokens // len(narrow))):
            writer.append(narrow, block.sample_lengths, block.samples_per_row)
        writer.finish()


def write_manifest(path: Path, utterances: int) -> None:
    """JSONL of utterances of about 12 seconds, three words a second, words as often as in a language."""
    rng = np.random.default_rng(0)
    syllables = [first + rest for first in "bdfgklmnprstvz" for rest in ("a", "en", "i", "or", "u", "ast")]
    lexicon = ["".join(rng.choice(syllables, size)) for size in rng.integers(1, 5, 20_000)]
    with path.open("w") as file:
        for number in range(utterances):
            words = _SHORTEST_SAMPLE + int(rng.lognormal(3.4, 0.5))
            ends = np.cumsum(rng.uniform(0.15, 0.5, words)).round(2).tolist()
            texts = [lexicon[min(rank, len(lexicon)) - 1] for rank in rng.zipf(1.3, words)]
            times = zip(texts, [0.0, *ends[:-1]], ends, strict=True)
            record = {
                "id": f"utterance-{number}",
                "units": rng.integers(0, USDM_VOCABULARY.unit_count, round(50 * ends[-1])).tolist(),
                "words": [{"text": text, "start": start, "end": end} for text, start, end in times],
            }
            file.write(json.dumps(record) + "\n")
