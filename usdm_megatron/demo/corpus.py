"""A small corpus with something to learn, in the formats that the preprocessor takes.

    speech.jsonl    utterances: units, and words with their times   → preprocess_data.py speech-text
    dialogs.jsonl   turns: text and units                           → preprocess_data.py dialog

A word always sounds the same (its few speech units, with a little noise and varying duration), so whoever
reads `units <|correspond|> text` can find the text in the units. Sentences are words at random, and no
two are equal: nothing else predicts them, and whatever a split holds out was never said in training.
The agent answers every word of the user by the next one of the word list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.corpora.alignment import UNITS_PER_SECOND
from usdm_megatron.demo.settings import DEMO, DemoSettings
from usdm_megatron.vocab import USDM_VOCABULARY

# fmt: off
WORDS = (  # each is one token of Mistral's
    "river", "stone", "cloud", "garden", "winter", "summer", "window", "yellow", "silver", "market",
    "dinner", "morning", "evening", "music", "letter", "doctor", "school", "flower", "forest", "mountain",
)
# fmt: on
UTTERANCES = "speech.jsonl"
DIALOGS = "dialogs.jsonl"
SPEAKERS = ("user", "agent")
_MOST_DRAWS = 1000  # of a sentence that was not said before
Sentence = tuple[str, ...]


@dataclass(frozen=True)
class Speech:
    """The words of a sentence, and for each the speech units (0 .. 9,999) that it lasts for."""

    words: Sentence
    units: tuple[tuple[int, ...], ...]

    @property
    def all_units(self) -> list[int]:
        return list(chain.from_iterable(self.units))

    def to_utterance(self, utterance_id: str) -> dict[str, Any]:
        """A line of a manifest; times are in seconds."""
        bounds_s = [units / UNITS_PER_SECOND for units in accumulate(map(len, self.units), initial=0)]
        return {
            "id": utterance_id,
            "units": self.all_units,
            "words": [
                {"text": word, "start": start_s, "end": end_s}
                for word, (start_s, end_s) in zip(self.words, pairwise(bounds_s), strict=True)
            ],
        }

    def to_turn(self, speaker: str) -> dict[str, Any]:
        """A turn of a dialog."""
        return {"speaker": speaker, "text": " ".join(self.words), "units": self.all_units}


def reply_to(sentence: Sentence) -> Sentence:
    """What the agent answers: for every word the next one of the list."""
    return tuple(WORDS[(WORDS.index(word) + 1) % len(WORDS)] for word in sentence)


class Speaker:
    """Draws sentences, none twice, and says them; the same seed draws the same ones."""

    def __init__(self, settings: DemoSettings) -> None:
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._all_sounds = self._rng.choice(
            USDM_VOCABULARY.unit_count, len(WORDS) * settings.word_units, replace=False
        )
        self.sounds = dict(zip(WORDS, self._all_sounds.reshape(len(WORDS), -1).tolist(), strict=True))
        self._said: set[Sentence] = set()

    def utterances(self) -> Iterator[Speech]:
        """Sentences by themselves: short ones, and now and then a long one."""
        settings = self._settings
        for _ in range(settings.utterances):
            is_long = self._rng.random() < settings.long_utterance_share
            words = settings.long_utterance_words if is_long else settings.short_utterance_words
            (sentence,) = self._new_sentences(words, 1)
            yield self.say(sentence)

    def dialogs(self) -> Iterator[list[Speech]]:
        """Sentences that answer one another, a turn each."""
        settings = self._settings
        for _ in range(settings.dialogs):
            turns = self._between(settings.dialog_turns)
            yield [self.say(sentence) for sentence in self._new_sentences(settings.dialog_words, turns)]

    def say(self, sentence: Sentence) -> Speech:
        return Speech(sentence, tuple(map(self._pronounce, sentence)))

    def _new_sentences(self, words: tuple[int, int], turns: int) -> list[Sentence]:
        """A sentence of `words[0]` to `words[1]` words and the replies to it, none of them said before."""
        for _ in range(_MOST_DRAWS):
            drawn = self._rng.integers(0, len(WORDS), self._between(words))
            sentences = [tuple(WORDS[index] for index in drawn)]
            while len(sentences) < turns:
                sentences.append(reply_to(sentences[-1]))
            if self._said.isdisjoint(sentences):
                self._said.update(sentences)
                return sentences
        raise ValueError(f"{len(self._said)} sentences leave no new one of {words[0]} to {words[1]} words")

    def _pronounce(self, word: str) -> tuple[int, ...]:
        units: list[int] = []
        for unit in self.sounds[word]:
            is_noisy = self._rng.random() < self._settings.noisy_unit_share
            lasts = 2 if self._rng.random() < self._settings.repeated_unit_share else 1
            units += [int(self._rng.choice(self._all_sounds)) if is_noisy else unit] * lasts
        return tuple(units)

    def _between(self, bounds: tuple[int, int]) -> int:
        return int(self._rng.integers(bounds[0], bounds[1] + 1))


def write_demo_corpus(directory: Path, settings: DemoSettings = DEMO) -> Path:
    """Write `speech.jsonl` and `dialogs.jsonl` into `directory`; the same settings write the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    speaker = Speaker(settings)
    _write_lines(
        directory / UTTERANCES,
        (speech.to_utterance(f"utterance-{number:05}") for number, speech in enumerate(speaker.utterances())),
    )
    _write_lines(
        directory / DIALOGS,
        (
            {"id": f"dialog-{number:05}", "turns": _turns(dialog)}
            for number, dialog in enumerate(speaker.dialogs())
        ),
    )
    return directory


def _turns(dialog: Sequence[Speech]) -> list[dict[str, Any]]:
    return [speech.to_turn(SPEAKERS[number % 2]) for number, speech in enumerate(dialog)]


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
