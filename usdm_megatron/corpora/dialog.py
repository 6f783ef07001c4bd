"""Spoken dialogs → fine-tuning samples, by the template of USDM's `dailytalk_single_turn.py`.

The template, `\\n` a line end, `</s>` eos, bos before all:

    Below is a conversation … and the corresponding speech.\\n
    \\n### User\\n{user units}<|correspond|>{user text}
    \\n### Agent\\n{agent text}<|correspond|>{agent units}\\n</s>

A token is a target in the user's text and the line end after it, and from the agent's text up to what the
tokenizer puts before the last line end (Mistral's `▁`, at which the spoken reply stops). Texts are in lower
case. Ids are those of the whole string under the original's tokenizer: units and `<|correspond|>` are
special tokens, and every stretch of text between two of them is encoded alone.

Several exchanges follow one another under one instruction, each as above:

    …<|correspond|>{agent units}\\n\\n### User\\n{user units}<|correspond|>{user text}\\n### Agent\\n…

with the same targets in each (the `▁` before the line ends too). The original's masking code counts on
exactly this, five line ends an exchange, though nothing in it writes more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from usdm_megatron.corpora.alignment import UNITS_MISSING, Rejected
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

INSTRUCTION = (
    "Below is a conversation between the user and the agent. Each turn includes the user's speech and its "
    "corresponding transcript, along with the agent's response text and the corresponding speech.\n"
)
_USER = "\n### User\n"
_AGENT = "\n### Agent\n"
_END = "\n"

# Reasons, by which rejected dialogs are counted.
FEWER_THAN_2_TURNS = "fewer_than_2_turns"
SPEAKER_TWICE = "speaker_twice_in_a_row"
MORE_THAN_2_SPEAKERS = "more_than_2_speakers"
TEXT_MISSING = "text_missing"
LINE_END_IN_TEXT = "line_end_in_text"

Encode = Callable[[str], Sequence[int] | np.ndarray]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says before the other does; `units` int32 `[N]` are unit numbers, from 0."""

    speaker: str
    text: str
    units: np.ndarray


@dataclass(frozen=True, slots=True)
class Exchange:
    """A turn and its answer; turns of a dialog are counted from 0."""

    user: Turn
    agent: Turn
    first_turn: int


@dataclass(frozen=True, slots=True)
class DialogSample:
    """Token ids int32 `[T]`, and uint8 `[T]`: 1 where the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    turns: range  # of the dialog


@dataclass(frozen=True, slots=True)
class _Piece:
    ids: np.ndarray
    is_target: bool


def exchanges(turns: Sequence[Turn], offset: int) -> list[Exchange]:
    """Turn and answer, beginning with turn `offset` (0 or 1); a turn left over at the end is left out."""
    return [Exchange(turns[at], turns[at + 1], at) for at in range(offset, len(turns) - 1, 2)]


def check_turns(turns: Sequence[Turn], *, multi_turn: bool) -> None:
    """Raise `Rejected` for a dialog that the template cannot hold.

    With `multi_turn` speakers keep their roles throughout a sample: there can be two.
    """
    if len(turns) < 2:
        raise Rejected(FEWER_THAN_2_TURNS, f"{len(turns)} turns")
    for number, (turn, following) in enumerate(pairwise(turns)):
        if turn.speaker == following.speaker:
            raise Rejected(SPEAKER_TWICE, f"speaker {turn.speaker}, turns {number} and {number + 1}")
    speakers = {turn.speaker for turn in turns}
    if multi_turn and len(speakers) > 2:
        raise Rejected(MORE_THAN_2_SPEAKERS, f"{len(speakers)} speakers, but a user and an agent")
    for number, turn in enumerate(turns):
        if not turn.text.strip():
            raise Rejected(TEXT_MISSING, f"turn {number}")
        if _END in turn.text:
            raise Rejected(LINE_END_IN_TEXT, f"turn {number}; line ends divide the template")
        if len(turn.units) == 0:
            raise Rejected(UNITS_MISSING, f"turn {number}")


class DialogTemplate:
    """Exchanges → ids and loss mask. `encode` gives a text's ids, without bos and eos.

    Raises `DataError` for a tokenizer that joins line ends with other characters: where the loss is to be
    could then not be said by the token.
    """

    def __init__(self, encode: Encode, vocabulary: Vocabulary) -> None:
        self._encode = encode
        self._first_unit_id = vocabulary.first_unit_id
        self._line_end_id = int(encode(_END)[-1])
        self._head = _Piece(_int32([vocabulary.bos_id, *encode(INSTRUCTION + _USER)]), False)
        self._not_target, self._target = (
            _Piece(_int32([vocabulary.correspond_id]), is_target) for is_target in (False, True)
        )
        self._between = self._after_units(_END + _USER)
        self._last = [*self._after_units(_END), _Piece(_int32([vocabulary.eos_id]), False)]
        self._text("a?", "b.")  # finds out about the tokenizer at once

    def sample(self, run: Sequence[Exchange]) -> DialogSample:
        """The sample of one exchange, or of several that follow one another."""
        return self._join([self._exchange(exchange) for exchange in run], run)

    def samples(self, run: Sequence[Exchange], seq_length: int) -> Iterator[DialogSample]:
        """Samples of as many exchanges as `seq_length` tokens hold; the next one begins a new sample.

        An exchange that is too long by itself is a sample that is too long.
        """
        frame = _length([self._head, *self._last])
        room = seq_length
        begun: list[list[_Piece]] = []
        first = 0
        for number, exchange in enumerate(run):
            pieces = self._exchange(exchange)
            needed = _length(pieces) + (_length(self._between) if begun else frame)
            if begun and needed > room:
                yield self._join(begun, run[first:number])
                begun, first, room = [], number, seq_length
                needed = _length(pieces) + frame
            begun.append(pieces)
            room -= needed
        if begun:
            yield self._join(begun, run[first:])

    def _join(self, exchange_pieces: Sequence[list[_Piece]], run: Sequence[Exchange]) -> DialogSample:
        pieces = [self._head]
        for number, of_exchange in enumerate(exchange_pieces):
            pieces += [*self._between, *of_exchange] if number else of_exchange
        pieces += self._last
        return DialogSample(
            tokens=np.concatenate([piece.ids for piece in pieces]),
            loss_mask=np.repeat(
                np.array([piece.is_target for piece in pieces], dtype=np.uint8),
                [len(piece.ids) for piece in pieces],
            ),
            turns=range(run[0].first_turn, run[-1].first_turn + 2),
        )

    def _exchange(self, exchange: Exchange) -> list[_Piece]:
        user, agent = exchange.user, exchange.agent
        return [
            _Piece(self._unit_ids(user), False),
            self._not_target,
            *self._text(user.text.lower(), agent.text.lower()),
            self._target,
            _Piece(self._unit_ids(agent), True),
        ]

    def _unit_ids(self, turn: Turn) -> np.ndarray:
        return turn.units.astype(np.int32) + np.int32(self._first_unit_id)

    def _text(self, user: str, agent: str) -> list[_Piece]:
        """The one stretch of text in an exchange: what the user said, the header, what the agent says."""
        ids = _int32(self._encode(user + _AGENT + agent))
        line_ends = np.flatnonzero(ids == self._line_end_id)
        if len(line_ends) != 2:
            raise DataError(
                f"--tokenizer: {user + _AGENT + agent!r} has {len(line_ends)} tokens for its 2 line ends; "
                "the dialog template needs a tokenizer that keeps them apart from the text, as Mistral's does"
            )
        after_user, before_agent = line_ends + 1
        return [
            _Piece(ids[:after_user], True),
            _Piece(ids[after_user:before_agent], False),
            _Piece(ids[before_agent:], True),
        ]

    def _after_units(self, text: str) -> list[_Piece]:
        """Text behind the agent's units: what the tokenizer puts before it is a target, itself is none."""
        ids = _int32(self._encode(text))
        first = int(np.argmax(ids == self._line_end_id))
        return [_Piece(ids[:first], True), _Piece(ids[first:], False)]


def _int32(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def _length(pieces: Sequence[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)
