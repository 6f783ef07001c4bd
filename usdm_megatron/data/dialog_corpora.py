"""Spoken dialogs from JSONL, and from DailyTalk's folder, as fine-tuning samples.

What is wrong with one dialog makes a `Rejection` of it; what is wrong with a file (no JSON, no UTF-8, fields
missing) is a `DataError` that names file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from usdm_megatron.data.alignment import Rejected
from usdm_megatron.data.dialog import DialogSample, DialogTemplate, Turn, check_turns, exchanges
from usdm_megatron.data.id_samples import fitting_samples
from usdm_megatron.data.samples import Rejection, SampleBlock, utterance_hash
from usdm_megatron.data.speech_corpora import UNIT_OUT_OF_RANGE, is_unicode, parse_units
from usdm_megatron.data.speech_text import SPECIAL_TOKEN_IN_TEXT
from usdm_megatron.data.text_encoder import TextEncoder
from usdm_megatron.data.text_lines import LinePart, input_files, line_parts, parse_json_lines
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

DIALOGS_PER_PART = 250  # of DailyTalk, whose every turn is a file
TURNS_MISSING = "turns_missing"
MALFORMED_TEXT = "malformed_text"
_UTTERANCE_NAME = re.compile(r"(?P<turn>[0-9]+)_(?P<speaker>[^_/\\]+)_d(?P<dialog>[0-9]+)")


@dataclass(frozen=True, slots=True)
class Dialog:
    """Turns in order. Samples of one `id` are kept together by a validation split."""

    id: str
    turns: tuple[Turn, ...]


class DialogCorpus(Protocol):
    """Dialogs in order. Pickled to workers: hold paths, open files in `read`."""

    def files(self) -> list[tuple[str, Path]]:
        """Every input file as (name relative to the input, path)."""
        ...

    def parts(self) -> Sequence[Any]:
        """The parts, picklable, in order; they depend on the input alone."""
        ...

    def read(self, part: Any) -> Iterator[Dialog | Rejection]:
        """The dialogs of one part, in order."""
        ...


@dataclass(frozen=True)
class DialogSource:
    """A `SampleSource`: the dialogs of `corpus` in the template of `dialog.py`, from both offsets of a dialog.

    A sample is an exchange; with `multi_turn` as many exchanges of a dialog as `seq_length` tokens hold.
    Each turn but the first and the last is the user's in one sample and the agent's in another. An
    exchange that is longer than `seq_length` is a rejection.
    """

    corpus: DialogCorpus
    encoder: TextEncoder
    vocabulary: Vocabulary
    seq_length: int = 8192
    multi_turn: bool = False

    def files(self) -> list[tuple[str, Path]]:
        return self.corpus.files()

    def parts(self) -> Sequence[Any]:
        return self.corpus.parts()

    def make(self, part: Any) -> SampleBlock:
        template = DialogTemplate(self.encoder.encode, self.vocabulary)
        made: list[DialogSample] = []
        dialog_ids: list[str] = []
        rejections: list[Rejection] = []
        for found in self.corpus.read(part):
            if isinstance(found, Rejection):
                rejections.append(found)
                continue
            try:
                self._check(found.turns)
            except Rejected as rejected:
                rejections.append(Rejection(found.id, rejected.reason, rejected.detail))
                continue
            for sample in self._samples(found, template):
                made.append(sample)
                dialog_ids.append(found.id)
        block = SampleBlock(
            tokens=_concatenated([sample.tokens for sample in made], np.int32),
            lengths=np.array([len(sample.tokens) for sample in made], dtype=np.int64),
            utterances=np.array([utterance_hash(dialog_id) for dialog_id in dialog_ids], dtype=np.uint64),
            groups=np.zeros(len(made), dtype=np.int32),
            loss_mask=_concatenated([sample.loss_mask for sample in made], np.uint8),
            rejections=tuple(rejections),
        )
        return fitting_samples(
            block, self.seq_length, lambda at: f"{dialog_ids[at]} turns {', '.join(map(str, made[at].turns))}"
        )

    def _check(self, turns: Sequence[Turn]) -> None:
        check_turns(turns, multi_turn=self.multi_turn)
        for number, turn in enumerate(turns):
            if (largest := int(turn.units.max())) >= self.vocabulary.unit_count:
                known = f"the vocabulary has 0 to {self.vocabulary.unit_count - 1}"
                raise Rejected(UNIT_OUT_OF_RANGE, f"turn {number}, unit {largest}: {known}")
            if token := self.encoder.special_token_in(turn.text.lower()):
                raise Rejected(SPECIAL_TOKEN_IN_TEXT, f"turn {number} spells {token}, a token with a meaning")

    def _samples(self, dialog: Dialog, template: DialogTemplate) -> Iterator[DialogSample]:
        for offset in (0, 1):
            run = exchanges(dialog.turns, offset)
            if self.multi_turn:
                yield from template.samples(run, self.seq_length)
            else:
                yield from (template.sample([exchange]) for exchange in run)


class JsonDialogs:
    """JSONL: `{"id": …, "turns": [{"speaker": …, "text": …, "units": […]}, …]}`, a dialog a line.

    Units are a list of numbers or a string of them; white space around a text is not part of it. A dialog
    without an id is known by its content. Files are read in natural order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = input_files(paths, "JSONL files, a dialog a line")

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._paths]

    def parts(self) -> list[LinePart]:
        return [part for path in self._paths for part in line_parts(path, "a dialog")]

    def read(self, part: LinePart) -> Iterator[Dialog | Rejection]:
        return parse_json_lines(part, parse_dialog, "a dialog")


def parse_dialog(record: Any, place: Callable[[], str]) -> Dialog | Rejection:
    """A line of JSONL; `place` names it in messages. A `DataError` says which field is missing."""
    if not isinstance(record, dict) or not isinstance(record.get("turns"), list):
        raise DataError(f"{place()}: {record!r:.60} is no dialog; it is an object with a list of turns")
    for number, turn in enumerate(record["turns"]):
        missing = [name for name in ("speaker", "text") if not isinstance(turn, dict) or name not in turn]
        if missing:
            raise DataError(
                f"{place()}: turn {number} has no {' and no '.join(missing)}; a turn is an object with "
                "speaker, text and units"
            )
    dialog_id = record.get("id")
    if dialog_id is None:
        dialog_id = json.dumps(record["turns"])
        name = place()
    elif type(dialog_id) in (int, str) and is_unicode(str(dialog_id)):
        dialog_id = name = str(dialog_id)
    else:
        raise DataError(f"{place()}: id is {dialog_id!r:.60}; it is a string or a number, or is left out")
    try:
        return Dialog(dialog_id, tuple(map(_parse_turn, record["turns"])))
    except Rejected as rejected:
        return Rejection(name, rejected.reason, rejected.detail)
