"""Spoken dialogs from JSONL, and from DailyTalk's folder, as fine-tuning samples.

What is wrong with one dialog makes a `Rejection` of it; what is wrong with a file (no JSON, no UTF-8, fields
missing) is a `DataError` that names file and line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from usdm_megatron.corpora.alignment import UNITS_MISSING, Rejected
from usdm_megatron.corpora.dialog import DialogSample, DialogTemplate, Turn, check_turns, exchanges
from usdm_megatron.corpora.speech_corpora import UNIT_OUT_OF_RANGE, is_unicode, parse_units
from usdm_megatron.corpora.speech_text import SPECIAL_TOKEN_IN_TEXT
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.id_samples import fitting_samples
from usdm_megatron.preprocess.samples import Occurrences, Rejection, SampleBlock
from usdm_megatron.preprocess.text_lines import LinePart, input_files, line_parts, parse_json_lines
from usdm_megatron.tokenizer.text_encoder import TextEncoder
from usdm_megatron.vocab import Vocabulary

DIALOGS_PER_PART = 250  # of DailyTalk, whose every turn is a file
TURNS_NOT_CONSECUTIVE = "turns_not_consecutive"
MALFORMED_SPEAKER = "malformed_speaker"
MALFORMED_TEXT = "malformed_text"
_TURN_NAME = re.compile(r"(?P<turn>[0-9]{1,9})_(?P<speaker>[0-9A-Za-z]+)_d(?P<dialog>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Dialog:
    """Turns in order. Samples of one `id` are kept together by a validation split."""

    id: str
    turns: tuple[Turn, ...]
    where: Callable[[], str]  # names the dialog in messages


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
    """A `SampleSource`: the dialogs of `corpus` in the template of `dialog.py`.

    A sample is an exchange; with `multi_turn` as many exchanges of a dialog as `seq_length` tokens hold.
    Exchanges begin with a dialog's first turn, and once more with its second.
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
        heard = list(map(self._checked, self.corpus.read(part)))
        made: list[DialogSample] = []
        dialog_of: list[Dialog] = []
        numbers: list[int] = []  # of those dialogs, counted with the rejected ones
        for number, found in enumerate(heard):
            if isinstance(found, Dialog):
                for sample in self._samples(found, template):
                    made.append(sample)
                    dialog_of.append(found)
                    numbers.append(number)
        occurrences = Occurrences.of(
            ids=[one.where if isinstance(one, Rejection) else one.id for one in heard],
            is_rejected=[isinstance(one, Rejection) for one in heard],
            of_sample=numbers,
        )
        block = SampleBlock(
            tokens=_concatenated([sample.tokens for sample in made], np.int32),
            lengths=np.array([len(sample.tokens) for sample in made], dtype=np.int64),
            utterances=occurrences.ids[occurrences.of_sample],
            groups=np.zeros(len(made), dtype=np.int32),
            loss_mask=_concatenated([sample.loss_mask for sample in made], np.uint8),
            rejections=tuple(one for one in heard if isinstance(one, Rejection)),
            occurrences=occurrences,
        )

        def place(sample: int) -> str:
            turns = made[sample].turns
            return f"{dialog_of[sample].where()}, turns {turns.start} to {turns.stop - 1}"

        return fitting_samples(block, self.seq_length, place)

    def _checked(self, found: Dialog | Rejection) -> Dialog | Rejection:
        if isinstance(found, Dialog):
            try:
                self._check(found.turns)
            except Rejected as rejected:
                return Rejection(found.where(), rejected.reason, rejected.detail)
        return found

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
    is_id = type(dialog_id) is int or (type(dialog_id) is str and dialog_id != "" and is_unicode(dialog_id))
    if dialog_id is not None and not is_id:
        raise DataError(
            f"{place()}: id is {dialog_id!r:.60}; it is a string or a number, or is left out where empty"
        )
    where = place if dialog_id is None else partial(str, dialog_id)
    try:
        turns = tuple(
            _parse_turn(number, turn["speaker"], turn["text"], turn.get("units"))
            for number, turn in enumerate(record["turns"])
        )
    except Rejected as rejected:
        return Rejection(where(), rejected.reason, rejected.detail)
    return Dialog(json.dumps(record["turns"]) if dialog_id is None else str(dialog_id), turns, where)


def _parse_turn(number: int, speaker: Any, text: Any, units: Any) -> Turn:
    try:
        if type(speaker) not in (int, str) or not is_unicode(str(speaker)):
            raise Rejected(MALFORMED_SPEAKER, f"{speaker!r:.60}: a speaker is a name or a number")
        if type(text) is not str or not is_unicode(text):
            raise Rejected(MALFORMED_TEXT, f"{text!r:.60}: a text is a string without half surrogate pairs")
        return Turn(str(speaker), text.strip(), parse_units(units))
    except Rejected as rejected:
        raise Rejected(rejected.reason, f"turn {number}: {rejected.detail}") from None


@dataclass(frozen=True, slots=True)
class DailyTalkTurn:
    """What the metadata know of a turn."""

    dialog: int
    turn: int
    speaker: str
    text: str

    def units_path(self, directory: Path) -> Path:
        """Where its units are: decimal numbers, as stage 1 writes them beside a recording."""
        name = f"{self.turn}_{self.speaker}_d{self.dialog}_unit.txt"
        return directory / "data" / str(self.dialog) / name


class DailyTalkDialogs:
    """DailyTalk's folder: `data/{dialog}/{turn}_{speaker}_d{dialog}.wav` with `…_unit.txt` beside each.

    `metadata` is its `metadata.json` (the default), or lines `{turn}_{speaker}_d{dialog}|…|{text}|{emotion}`
    as in the official `train_phone.txt` and `val_phone.txt`, from which the original takes its splits.
    Dialogs come in the order of their numbers.
    """

    def __init__(self, directory: Path, metadata: Path | None = None) -> None:
        self._directory = directory
        self._metadata = metadata or directory / "metadata.json"
        if not self._metadata.is_file():
            raise DataError(
                f"{self._metadata}: no such file; DailyTalk's folder holds data/ and metadata.json, or name "
                "another list of its turns"
            )

    def files(self) -> list[tuple[str, Path]]:
        paths = [turn.units_path(self._directory) for turn in chain.from_iterable(self._dialogs())]
        there = [(path.relative_to(self._directory).as_posix(), path) for path in paths if path.is_file()]
        return [(self._metadata.name, self._metadata), *there]

    def parts(self) -> list[list[list[DailyTalkTurn]]]:
        dialogs = self._dialogs()
        return [dialogs[at : at + DIALOGS_PER_PART] for at in range(0, len(dialogs), DIALOGS_PER_PART)]

    def read(self, part: list[list[DailyTalkTurn]]) -> Iterator[Dialog | Rejection]:
        for turns in part:
            dialog_id = f"d{turns[0].dialog}"
            try:
                if [turn.turn for turn in turns] != list(range(len(turns))):
                    numbers = ", ".join(str(turn.turn) for turn in turns)
                    raise Rejected(TURNS_NOT_CONSECUTIVE, f"turns {numbers}")
                parsed = [self._parsed(turn) for turn in turns]
            except Rejected as rejected:
                yield Rejection(dialog_id, rejected.reason, rejected.detail)
            else:
                yield Dialog(dialog_id, tuple(parsed), partial(str, dialog_id))

    def _parsed(self, turn: DailyTalkTurn) -> Turn:
        path = turn.units_path(self._directory)
        try:
            units = path.read_bytes().decode("ascii", "replace")
        except OSError as error:
            raise Rejected(UNITS_MISSING, f"{path}: cannot be read ({error.strerror})") from None
        return _parse_turn(turn.turn, turn.speaker, turn.text, units)

    def _dialogs(self) -> list[list[DailyTalkTurn]]:
        """Turns in order, by dialog in order."""
        read = _metadata_json if self._metadata.suffix == ".json" else _metadata_lines
        try:
            turns = sorted(read(self._metadata), key=lambda turn: (turn.dialog, turn.turn))
        except OSError as error:
            raise DataError(f"{self._metadata}: cannot be read ({error.strerror})") from error
        if not turns:
            raise DataError(f"{self._metadata}: names no turns")
        return [list(of_dialog) for _, of_dialog in groupby(turns, key=lambda turn: turn.dialog)]


def _metadata_json(path: Path) -> Iterator[DailyTalkTurn]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(turns, dict) for turns in content.values()):
        raise DataError(f"{path}: must hold an object of dialogs, and each an object of turns")
    for dialog, turns in content.items():
        for turn, facts in turns.items():
            try:
                yield _listed_turn(f"{turn}_{facts['speaker']}_d{dialog}", facts["text"])
            except (KeyError, TypeError, ValueError):
                raise DataError(
                    f"{path}: dialog {dialog!r:.20}, turn {turn!r:.20} is {facts!r:.80}; "
                    "both are numbers, and a turn has a speaker and a text"
                ) from None


def _metadata_lines(path: Path) -> Iterator[DailyTalkTurn]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            name, *_, text, _ = line.decode("utf-8").strip().split("|")
            yield _listed_turn(name, text)
        except ValueError:
            raise DataError(
                f"{path} line {number}: {line!r:.80} is no turn of DailyTalk; a line is UTF-8 and "
                "{turn}_{speaker}_d{dialog}|…|{text}|{emotion}"
            ) from None


def _listed_turn(name: str, text: Any) -> DailyTalkTurn:
    """A `ValueError` where `name` is no name of a turn: it becomes part of a path."""
    found = _TURN_NAME.fullmatch(name)
    if found is None or type(text) is not str:
        raise ValueError(name)
    return DailyTalkTurn(int(found["dialog"]), int(found["turn"]), found["speaker"], text)


def _concatenated(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])
