"""Units → transcript → reply text → reply units: the three steps of USDM's `src/inference.py`.

Every step continues a prefix of the dialog template (`corpora/dialog.py`), never writes a range of ids, and
ends at one token:

    step         the prompt ends with                    never writes           stops at
    transcript   {user units}<|correspond|>              behind the text ids    the line end
    reply text   {transcript}\\n### Agent\\n               units and behind       <|correspond|>
    reply units  {reply text}<|correspond|>              below the units        `▁`, Mistral's 28705

As in the original, what a step wrote becomes text, and text becomes ids again before the next step; eos
ends nothing; `<pad>` may stand among the units and is left out. Unlike it, an empty transcript or
reply text keeps its place in the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from usdm_megatron.corpora.dialog import DialogTemplate, Exchange, Turn
from usdm_megatron.errors import DataError
from usdm_megatron.reply.model_directory import ModelDirectory
from usdm_megatron.vocab import CORRESPOND_TOKEN

STEPS = ("transcript", "reply text", "reply units")
_LINE_END = "\n"
_ANY_TEXT = "."
_ANY_UNITS = np.zeros(1, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class StepRule:
    """What a step never writes (unless it is where it stops), and where it stops."""

    banned: range
    stop_id: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote behind a prompt, int32 `[T]` without the stop token, and whether it came to it."""

    ids: np.ndarray
    stopped: bool


# Continues every prompt (ids, int32 `[T]`) by the rule; `GreedyDecoder` is one.
Decode = Callable[[Sequence[np.ndarray], StepRule], list[Continuation]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What was understood and answered; `units` int32 `[N]` are unit numbers, from 0."""

    transcript: str
    text: str
    units: np.ndarray
    unfinished: tuple[str, ...] = ()  # of `STEPS`, those that ran out of tokens before their stop

    def to_json(self) -> str:
        """One object."""
        record = {**asdict(self), "units": self.units.tolist()}
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


class DialogPrompts:
    """The template's prefixes. They are cut from whole samples, so they are what training saw."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._template = DialogTemplate(directory.encoder.encode, directory.vocabulary)
        self._correspond_id = directory.vocabulary.correspond_id

    def for_transcript(self, units: np.ndarray) -> np.ndarray:
        """The prompt of the first step: up to the user's units (numbers from 0) and `<|correspond|>`."""
        tokens, first_target, _ = self._sample(units, _ANY_TEXT, _ANY_TEXT)
        return tokens[:first_target]

    def for_text(self, heard: np.ndarray, transcript: str) -> np.ndarray:
        """The prompt of the second step; `heard` is that of the first."""
        tokens, begin, end = self._sample(_ANY_UNITS, transcript, _ANY_TEXT)
        return np.concatenate([heard, tokens[begin:end]])

    def for_units(self, heard: np.ndarray, transcript: str, text: str) -> np.ndarray:
        """The prompt of the third step; `heard` is that of the first."""
        tokens, begin, agent = self._sample(_ANY_UNITS, transcript, text)
        end = agent + int(np.argmax(tokens[agent:] == self._correspond_id)) + 1
        return np.concatenate([heard, tokens[begin:end]])

    def _sample(self, units: np.ndarray, transcript: str, text: str) -> tuple[np.ndarray, int, int]:
        """A sample's ids, and where its targets begin: the user's text, and the agent's."""
        exchange = Exchange(Turn("user", transcript, units), Turn("agent", text, _ANY_UNITS), 0)
        sample = self._template.sample([exchange])
        user, agent = np.flatnonzero(np.diff(sample.loss_mask, prepend=0) == 1)
        return sample.tokens, int(user), int(agent)


class Replier:
    """Replies with the model of a directory, whose weights are behind `decode`."""

    def __init__(self, directory: ModelDirectory, decode: Decode) -> None:
        vocabulary = directory.vocabulary
        self.directory = directory
        self.prompts = DialogPrompts(directory)
        self._decode = decode
        line_end = directory.encoder.encode(_LINE_END)
        self.line_end_id = int(line_end[-1])
        first_unit = vocabulary.first_unit_id
        self.transcript_rule = StepRule(range(vocabulary.text_size, vocabulary.size), self.line_end_id)
        self.text_rule = StepRule(range(first_unit, vocabulary.size), vocabulary.correspond_id)
        # what the tokenizer puts before the line end behind the units; without any, the line end itself
        self.units_rule = StepRule(range(first_unit), int(line_end[0]))

    def reply(self, heard: Sequence[np.ndarray]) -> list[Reply]:
        """The reply to every first-step prompt; raises `DataError` where one leaves no room to write."""
        self._check_room(heard)
        recognised = self._decode(heard, self.transcript_rule)
        transcripts = [self.transcript_of(step.ids) for step in recognised]
        prompts = list(map(self.prompts.for_text, heard, transcripts))
        answered = self._decode(prompts, self.text_rule)
        texts = [self.text_of(step.ids) for step in answered]
        prompts = list(map(self.prompts.for_units, heard, transcripts, texts))
        spoken = self._decode(prompts, self.units_rule)
        return [
            Reply(
                transcript=transcript,
                text=text,
                units=self.units_of(steps[-1].ids),
                unfinished=tuple(name for name, step in zip(STEPS, steps, strict=True) if not step.stopped),
            )
            for transcript, text, *steps in zip(transcripts, texts, recognised, answered, spoken, strict=True)
        ]

    def transcript_of(self, ids: np.ndarray) -> str:
        """The text of a transcript's ids, in lower case as in training, up to a line end."""
        line = self._decoded(ids).partition(_LINE_END)[0]
        return line.removeprefix(" ").removesuffix(" ").lower()

    def text_of(self, ids: np.ndarray) -> str:
        """The text of a reply's ids, in lower case, behind the last line end."""
        return self._decoded(ids).rpartition(_LINE_END)[2].removeprefix(" ").lower()

    def _decoded(self, ids: np.ndarray) -> str:
        """Decoded behind a special token: at its beginning, a text would lose a space."""
        behind = self.directory.decode([self.directory.vocabulary.correspond_id, *ids.tolist()])
        return behind.rpartition(CORRESPOND_TOKEN)[2]

    def units_of(self, ids: np.ndarray) -> np.ndarray:
        """Unit numbers, int32 `[N]`, of the ids that are units."""
        vocabulary = self.directory.vocabulary
        numbers = ids - np.int32(vocabulary.first_unit_id)
        return numbers[(numbers >= 0) & (numbers < vocabulary.unit_count)]

    def _check_room(self, heard: Sequence[np.ndarray]) -> None:
        longest, most = max(map(len, heard), default=0), self.directory.context_tokens
        if longest >= most:
            raise DataError(
                f"{self.directory.path}: reads {most:,} tokens at once, and the prompt takes {longest:,}; "
                "shorten what the user says"
            )
