"""A small speech-text corpus with something to learn, in the format of USDM's stage 4.

A word always sounds the same (its two speech units, with a little noise and varying duration),
so whoever reads `units <|correspond|> text` can find the text in the units. Utterances are
words at random: nothing else predicts them, and held-out combinations are new.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from usdm_megatron.demo.settings import DEMO, DemoSettings
from usdm_megatron.demo.tokenizer import mistral_sentencepiece_model
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

# fmt: off
WORDS = [
    "river", "stone", "cloud", "garden", "winter", "summer", "window", "yellow", "silver", "market",
    "dinner", "morning", "evening", "music", "letter", "doctor", "school", "flower", "forest", "mountain",
    "island", "bridge", "train", "station", "kitchen", "table", "paper", "story", "picture", "water",
    "coffee", "bread", "apple", "orange", "horse", "dragon", "castle", "engine", "planet", "ocean",
    "desert", "valley", "button", "candle", "mirror", "ladder", "hammer",
]
# fmt: on
HELDOUT_FILE = "heldout.jsonl"
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Utterance:
    """Words, and for each the speech units (0 .. 9,999) that it lasts for."""

    words: tuple[str, ...]
    units: tuple[tuple[int, ...], ...]

    @property
    def unit_count(self) -> int:
        return sum(map(len, self.units))


class Speaker:
    """Draws utterances; the same seed draws the same ones."""

    def __init__(self, settings: DemoSettings, rng: np.random.Generator) -> None:
        self.settings = settings
        self.rng = rng
        self.vocabulary = WORDS[: settings.words]
        sounds = rng.choice(USDM_VOCABULARY.unit_count, settings.words * settings.word_units, replace=False)
        self.sounds = dict(zip(self.vocabulary, sounds.reshape(settings.words, -1), strict=True))
        self.all_units = sounds

    def utter(self, length: tuple[int, int]) -> Utterance:
        """An utterance of `length[0]` to `length[1]` words."""
        count = int(self.rng.integers(length[0], length[1] + 1))
        words = tuple(self.vocabulary[i] for i in self.rng.integers(0, len(self.vocabulary), count))
        return Utterance(words, tuple(self._pronounce(word) for word in words))

    def utter_any(self) -> Utterance:
        """A short utterance, or now and then a long one."""
        settings = self.settings
        long = self.rng.random() < settings.long_utterance_share
        return self.utter(settings.long_utterance_words if long else settings.short_utterance_words)

    def _pronounce(self, word: str) -> tuple[int, ...]:
        units: list[int] = []
        for unit in self.sounds[word]:
            if self.rng.random() < self.settings.noisy_unit_share:
                unit = self.rng.choice(self.all_units)
            units += [int(unit)] * (2 if self.rng.random() < self.settings.repeated_unit_share else 1)
        return tuple(units)


def segment_bounds(utterance: Utterance, segment_units: int, rng: np.random.Generator) -> list[int]:
    """Word indices at which an utterance is cut, first and last included.

    The rule of USDM's stage 2: units // segment_units + 1 segments; inner cuts are drawn from a
    normal around the even split, truncated at one segment, and moved to the nearest word start.
    """
    starts = np.cumsum([0, *map(len, utterance.units)])
    segment = utterance.unit_count / (utterance.unit_count // segment_units + 1)
    cuts = {0, len(utterance.words)}
    for k in range(1, utterance.unit_count // segment_units + 1):
        offset = rng.normal(0, segment / 2)
        while abs(offset) > segment:
            offset = rng.normal(0, segment / 2)
        cuts.add(int(np.argmin(np.abs(starts - (k * segment + offset)))))
    return sorted(cuts)


def interleave(
    utterance: Utterance,
    *,
    tokenize: Tokenize,
    vocabulary: Vocabulary,
    segment_units: int,
    rng: np.random.Generator,
) -> list[int]:
    """Token ids of one interleaved sample, `[bos] … [eos]`, by the rule of USDM's stage 2."""
    ids = [vocabulary.bos_id]
    last_was_text: bool | None = None
    for start, end in pairwise(segment_bounds(utterance, segment_units, rng)):
        ids_of = {
            True: tokenize(" ".join(utterance.words[start:end])),
            False: unit_ids(utterance.units[start:end], vocabulary),
        }
        is_text = bool(rng.random() < 0.5)
        if last_was_text is not None and last_was_text != is_text:
            ids.append(vocabulary.continue_id)
        ids += ids_of[is_text]
        if rng.random() < 0.5:
            ids.append(vocabulary.correspond_id)
            is_text = not is_text
            ids += ids_of[is_text]
        last_was_text = is_text
    return [*ids, vocabulary.eos_id]


def unit_ids(units: tuple[tuple[int, ...], ...], vocabulary: Vocabulary) -> list[int]:
    """Token ids of the units of several words."""
    return [vocabulary.first_unit_id + unit for word in units for unit in word]


def pack_in_order(samples: Iterator[list[int]], seq_length: int) -> Iterator[list[int]]:
    """Rows of whole samples, at most `seq_length` ids each, in order (the original's stage 3)."""
    row: list[int] = []
    for sample in samples:
        if row and len(row) + len(sample) > seq_length:
            yield row
            row = []
        row = row + sample
    if row:
        yield row


def mistral_tokenize() -> Tokenize:
    """Text → ids without bos, as stage 2 tokenizes a segment."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_sentencepiece_model()))
    return lambda text: list(model.encode(text))


def write_demo_corpus(directory: Path, settings: DemoSettings = DEMO) -> Path:
    """Write `directory` (a `datasets.DatasetDict`: `train` and `test`, column `input_ids`).

    `heldout.jsonl` beside the two splits keeps the utterances behind `test`, for the swap figure.
    The same settings write the same rows.
    """
    from datasets import Dataset, DatasetDict

    rng = np.random.default_rng(settings.seed)
    speaker = Speaker(settings, rng)
    heldout = [speaker.utter_any() for _ in range(settings.heldout_utterances)]
    unseen = {utterance.words for utterance in heldout}
    tokenize = mistral_tokenize()

    def sample_of(utterance: Utterance) -> list[int]:
        return interleave(
            utterance,
            tokenize=tokenize,
            vocabulary=USDM_VOCABULARY,
            segment_units=settings.segment_units,
            rng=rng,
        )

    def train_samples() -> Iterator[list[int]]:
        while True:
            utterance = speaker.utter_any()
            if utterance.words not in unseen:
                yield sample_of(utterance)

    packed = pack_in_order(train_samples(), settings.seq_length)
    train = [next(packed) for _ in range(settings.train_rows)]
    test = list(pack_in_order(map(sample_of, heldout), settings.seq_length))
    splits = {
        "train": Dataset.from_dict({"input_ids": train}),
        "test": Dataset.from_dict({"input_ids": test}),
    }
    DatasetDict(splits).save_to_disk(str(directory))
    lines = [json.dumps({"words": utterance.words, "units": utterance.units}) for utterance in heldout]
    (directory / HELDOUT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def read_heldout(directory: Path) -> list[Utterance]:
    """The held-out utterances that `write_demo_corpus` kept."""
    records = map(json.loads, (directory / HELDOUT_FILE).read_text(encoding="utf-8").splitlines())
    return [Utterance(tuple(record["words"]), tuple(map(tuple, record["units"]))) for record in records]
