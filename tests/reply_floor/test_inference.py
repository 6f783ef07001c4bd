"""The three prompts against the original's golden ids, its ranges and stops, and its way from ids to text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reply_floor.conftest import GOLDEN, VOCABULARY, ScriptedDecoder, one_exchange
from usdm_megatron.corpora.dialog import DialogSample, DialogTemplate
from usdm_megatron.errors import DataError
from usdm_megatron.reply.inference import Continuation, DialogPrompts, Replier, StepRule
from usdm_megatron.reply.model_directory import ModelDirectory

# literal ids of Mistral-7B-v0.1 under USDM
LINE_END, CORRESPOND, LONE_SPACE, FIRST_UNIT = 13, 32001, 28705, 32002


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


@pytest.mark.parametrize("pair", [0, 1])
def test_prompts_are_prefixes_of_the_golden_samples(directory: ModelDirectory, pair: int) -> None:
    golden, loss = GOLDEN["samples"][pair]["ids"], GOLDEN["samples"][pair]["loss_positions"]
    user, agent = GOLDEN["turns"][pair : pair + 2]
    prompts = DialogPrompts(directory)
    heard = prompts.for_transcript(np.array(user["units"], dtype=np.int32))
    assert heard.tolist() == golden[: golden.index(CORRESPOND) + 1] == golden[: loss[0]]
    text = prompts.for_text(heard, user["text"].lower())
    agent_begins = next(after for before, after in zip(loss, loss[1:], strict=False) if after > before + 1)
    assert text.tolist() == golden[:agent_begins]
    units = prompts.for_units(heard, user["text"].lower(), agent["text"].lower())
    assert units.tolist() == golden[: golden.index(CORRESPOND, agent_begins) + 1]
    assert (heard.dtype, text.dtype, units.dtype) == (np.int32,) * 3


texts = st.text("abcde t'?!.,-<|>/suñß梦🙂\t0123456789", max_size=20)


@settings(max_examples=100, deadline=None)
@given(transcript=texts, text=texts, spoken=st.lists(st.integers(0, 19), min_size=1, max_size=5))
def test_prompts_are_prefixes_of_what_is_trained(
    directory: ModelDirectory, template: DialogTemplate, transcript: str, text: str, spoken: list[int]
) -> None:
    whole = template.sample(one_exchange(transcript, text, [3, 4], spoken)).tokens.tolist()
    prompts = DialogPrompts(directory)
    heard = prompts.for_transcript(ids(3, 4))
    second, third = prompts.for_text(heard, transcript), prompts.for_units(heard, transcript, text)
    for prompt in (heard, second, third):
        assert whole[: len(prompt)] == prompt.tolist()
    assert len(heard) < len(second) < len(third)
    assert whole[len(third) :][: len(spoken)] == [FIRST_UNIT + unit for unit in spoken]


def test_ranges_and_stops_of_the_original(directory: ModelDirectory) -> None:
    replier = Replier(directory, ScriptedDecoder([]))
    last = VOCABULARY.pad_id
    assert replier.transcript_rule == StepRule(range(32_000, last + 1), LINE_END)
    assert replier.text_rule == StepRule(range(32_002, last + 1), CORRESPOND)
    assert replier.units_rule == StepRule(range(32_002), LONE_SPACE)


def test_golden_dialogs_are_replied_to(
    directory: ModelDirectory, scripted: Callable[[list[DialogSample]], Replier]
) -> None:
    samples = [
        DialogSample(np.array(one["ids"], dtype=np.int32), np.zeros(0, dtype=np.uint8), range(2))
        for one in GOLDEN["samples"]
    ]
    replier = scripted(samples)
    heard = [replier.prompts.for_transcript(ids(*turn["units"])) for turn in GOLDEN["turns"][:2]]
    for reply, user, agent in zip(replier.reply(heard), GOLDEN["turns"], GOLDEN["turns"][1:], strict=False):
        assert (reply.transcript, reply.text) == (user["text"].lower(), agent["text"].lower())
        assert reply.units.tolist() == agent["units"]
        assert reply.unfinished == ()


def original_transcript(decoded: str) -> str:
    """`strip_exact_multiple` of the original on its first step, whose output ends with the line end."""
    text = decoded.split("<|correspond|>")[-1]
    for pattern in ("\n", " "):
        text = text.removeprefix(pattern)
        text = text.removesuffix(pattern)
    return text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([613, 28742, 28719, 4433, 28705, 259, 1, 2, 0, 774]), max_size=8))
def test_ids_become_text_as_in_the_original(directory: ModelDirectory, written: list[int]) -> None:
    replier = Replier(directory, ScriptedDecoder([]))
    heard = replier.prompts.for_transcript(ids(5)).tolist()
    decoded = directory.decode([*heard, *written, LINE_END])
    assert replier.transcript_of(ids(*written)) == original_transcript(decoded).lower()


def test_only_the_last_line_is_the_reply(directory: ModelDirectory) -> None:
    replier = Replier(directory, ScriptedDecoder([]))
    line = directory.encoder.encode("I'm\nFine, thanks")
    assert replier.text_of(line) == "fine, thanks"
    assert replier.transcript_of(line) == "i'm"
    assert replier.transcript_of(ids()) == replier.text_of(ids()) == ""


def test_pad_among_the_units_is_left_out(directory: ModelDirectory) -> None:
    replier = Replier(directory, ScriptedDecoder([]))
    assert replier.units_of(ids(FIRST_UNIT, VOCABULARY.pad_id, FIRST_UNIT + 19)).tolist() == [0, 19]


def test_steps_without_a_stop_are_named(directory: ModelDirectory) -> None:
    replier = Replier(directory, lambda prompts, rule: [Continuation(ids(), False) for _ in prompts])
    (reply,) = replier.reply([replier.prompts.for_transcript(ids(1))])
    assert (reply.transcript, reply.text, reply.units.tolist()) == ("", "", [])
    assert reply.unfinished == ("transcript", "reply text", "reply units")


def test_a_prompt_that_fills_the_context_is_refused(directory: ModelDirectory) -> None:
    replier = Replier(directory, ScriptedDecoder([]))
    heard = replier.prompts.for_transcript(ids(*[1] * 200))
    with pytest.raises(DataError, match="reads 200 tokens at once, and the prompt takes 245; shorten"):
        replier.reply([heard])
