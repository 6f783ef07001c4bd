"""Aligned speech-text corpora → interleaved samples, several draws of every utterance (epochs)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.corpora.alignment import UNITS_PER_SECOND, Rejected, Utterance, align
from usdm_megatron.corpora.interleave import Marks, Run, draw_runs, lay_out, run_text, sample_generator
from usdm_megatron.corpora.speech_corpora import UNIT_OUT_OF_RANGE, Corpus
from usdm_megatron.errors import ConfigError
from usdm_megatron.preprocess.id_samples import fitting_samples
from usdm_megatron.preprocess.samples import Occurrences, Rejection, SampleBlock
from usdm_megatron.tokenizer.text_encoder import TextEncoder
from usdm_megatron.vocab import Vocabulary

SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
EPOCHS_PER_PART = 8  # bounds a part's memory, however many epochs are asked for
_MOST_EPOCHS = 1 << 16  # the parts of all are listed before the first is made


@dataclass(frozen=True)
class SpeechTextPart:
    """A part of the corpus, and the epochs that are drawn of it."""

    corpus_part: Any
    epochs: range


@dataclass(frozen=True, slots=True)
class _Aligned:
    """An utterance ready to be drawn from; W words, N units."""

    id: str
    words: tuple[str, ...]  # [W]
    starts: tuple[int, ...]  # [W + 1], first units, and N
    unit_ids: np.ndarray  # int32 [N], token ids


@dataclass(frozen=True, slots=True)
class _Draw:
    utterance: _Aligned
    epoch: int
    runs: list[Run]


@dataclass(frozen=True)
class SpeechTextSource:
    """A `SampleSource`: every utterance of `corpus` drawn `epochs` times, epochs counted from 0.

    A sample depends on (seed, epoch, utterance id) and the utterance alone. Parts know nothing of one
    another, so ids that occur twice are left to who joins the parts (`SampleBlock.occurrences`).
    """

    corpus: Corpus
    encoder: TextEncoder
    vocabulary: Vocabulary
    epochs: int = 1
    seed: int = 0
    seq_length: int = 8192
    units_per_second: float = UNITS_PER_SECOND

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.epochs <= _MOST_EPOCHS:
            problems.append(f"--epochs is {self.epochs}, the least is 1 and the most {_MOST_EPOCHS}")
        if not 0 <= self.seed < 1 << 63:
            problems.append(f"--seed is {self.seed}; it is a number from 0 to 2^63 - 1")
        if self.seq_length < 1:
            problems.append(f"--seq-length is {self.seq_length}, the least is 1")
        if not 0 < self.units_per_second < float("inf"):
            problems.append(
                f"--units-per-second is {self.units_per_second}; it is above 0 (USDM's units: 50)"
            )
        if not self.vocabulary.has_speech:
            problems.append("--tokenizer: the vocabulary has no speech units to interleave; extend it")
        if problems:
            raise ConfigError(*problems)

    def files(self) -> list[tuple[str, Path]]:
        return self.corpus.files()

    def parts(self) -> list[SpeechTextPart]:
        chunks = [
            range(first, min(first + EPOCHS_PER_PART, self.epochs))
            for first in range(0, self.epochs, EPOCHS_PER_PART)
        ]
        # The corpus is read from its beginning to its end for every chunk: no reader has to go back.
        corpus_parts = self.corpus.parts()
        return [SpeechTextPart(part, epochs) for epochs in chunks for part in corpus_parts]

    def make(self, part: SpeechTextPart) -> SampleBlock:
        """Samples in the order of the utterances, and of each in the order of its epochs."""
        heard = list(self._aligned(part.corpus_part))
        utterances = [one for one in heard if isinstance(one, _Aligned)]
        rejections = [one for one in heard if isinstance(one, Rejection)]
        draws = [
            _Draw(
                utterance,
                epoch,
                draw_runs(utterance.starts, sample_generator(self.seed, epoch, utterance.id)),
            )
            for utterance in utterances
            for epoch in part.epochs
        ]
        # An utterance is rejected once, not once for every part that draws other epochs of it.
        block = self._block(
            draws, tuple(rejections) if part.epochs[0] == 0 else (), _occurrences(heard, part)
        )
        return fitting_samples(
            block, self.seq_length, lambda at: f"{draws[at].utterance.id} (epoch {draws[at].epoch})"
        )

    def _aligned(self, corpus_part: Any) -> Iterator[_Aligned | Rejection]:
        for found in self.corpus.read(corpus_part):
            if isinstance(found, Rejection):
                yield found
                continue
            try:
                yield self._align(found)
            except Rejected as rejected:
                yield Rejection(found.id, rejected.reason, rejected.detail)

    def _align(self, utterance: Utterance) -> _Aligned:
        if (largest := int(utterance.units.max(initial=0))) >= self.vocabulary.unit_count:
            raise Rejected(
                UNIT_OUT_OF_RANGE, f"unit {largest}, the vocabulary has 0 to {self.vocabulary.unit_count - 1}"
            )
        spans = align(
            utterance.words,
            len(utterance.units),
            duration_s=utterance.duration_s,
            units_per_second=self.units_per_second,
        )
        words = tuple(span.text for span in spans)
        if token := self.encoder.special_token_in(" ".join(words)):
            raise Rejected(SPECIAL_TOKEN_IN_TEXT, f"the transcript spells {token}, a token with a meaning")
        return _Aligned(
            utterance.id,
            words,
            (*(span.start_unit for span in spans), len(utterance.units)),
            utterance.units + np.int32(self.vocabulary.first_unit_id),
        )

    def _block(
        self, draws: list[_Draw], rejections: tuple[Rejection, ...], heard: Occurrences
    ) -> SampleBlock:
        texts = iter(
            self.encoder.encode_batch(
                [run_text(draw.utterance.words, run) for draw in draws for run in draw.runs if run.is_text]
            )
        )
        marks = Marks.of(self.vocabulary)
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        for draw in draws:
            sample = lay_out(draw.runs, draw.utterance.starts, draw.utterance.unit_ids, texts, marks)
            lengths.append(sum(map(len, sample)))
            pieces += sample
        return SampleBlock(
            tokens=np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32),
            lengths=np.array(lengths, dtype=np.int64),
            utterances=heard.ids[heard.of_sample],
            groups=np.array([draw.epoch for draw in draws], dtype=np.int32),
            rejections=rejections,
            occurrences=heard,
        )


def _occurrences(heard: list[_Aligned | Rejection], part: SpeechTextPart) -> Occurrences:
    """All that the part of the corpus names; samples are in the order of the utterances, epoch by epoch."""
    is_rejected = [isinstance(one, Rejection) for one in heard]
    return Occurrences.of(
        ids=[one.where if isinstance(one, Rejection) else one.id for one in heard],
        is_rejected=is_rejected,
        of_sample=np.repeat(np.flatnonzero(~np.array(is_rejected, dtype=np.bool_)), len(part.epochs)),
        first_epoch=part.epochs[0],
    )
