"""The dialog template against the original's golden ids and masks, and against its masking rule anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from usdm_megatron.corpora.alignment import Rejected
from usdm_megatron.corpora.dialog import DialogSample, DialogTemplate, Exchange, Turn, check_turns, exchanges
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.errors import DataError
from usdm_megatron.tokenizer.files import extend_tokenizer
from usdm_megatron.tokenizer.text_encoder import TextEncoder
from usdm_megatron.vocab import CORRESPOND_TOKEN, USDM_VOCABULARY, Vocabulary, unit_token

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "dialog_golden.json").read_text())
SMALL = Vocabulary(unit_count=20)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(write_mistral_tokenizer(tmp_path_factory.mktemp("mistral")))


@pytest.fixture(scope="module")
def whole_tokenizer(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The extended tokenizer of upstream's library, which cuts a whole formatted string itself."""
    extended = tmp_path_factory.mktemp("extended")
    extend_tokenizer(encoder.directory, extended, SMALL, model_max_length=8192)
    return Tokenizer.from_file(str(extended / "tokenizer.json"))


def turn(speaker: str, text: str = "hello there", units: list[int] | None = None) -> Turn:
    return Turn(speaker, text, np.array([5, 6] if units is None else units, dtype=np.int32))


def one_exchange(user: Turn, agent: Turn) -> list[Exchange]:
    return exchanges([user, agent], 0)


# --- the original


@pytest.mark.parametrize("offset", [0, 1])
def test_golden_ids_and_targets(encoder: TextEncoder, offset: int) -> None:
    turns = [turn(one["speaker"], one["text"], one["units"]) for one in GOLDEN["turns"]]
    sample = DialogTemplate(encoder.encode, USDM_VOCABULARY).sample(exchanges(turns, offset))
    expected = GOLDEN["samples"][offset]
    assert list(sample.turns) == expected["turn_pair"]
    assert sample.tokens.tolist() == expected["ids"]
    assert np.flatnonzero(sample.loss_mask).tolist() == expected["loss_positions"]
    assert (sample.tokens.dtype, sample.loss_mask.dtype) == (np.int32, np.uint8)


def original_ids_and_targets(tokenizer: Tokenizer, run: list[Exchange]) -> tuple[list[int], list[int]]:
    """`return_speech_template` and `tokenize_speech` of the original: targets found by counting line ends."""

    def units(of: Turn) -> str:
        return "".join(unit_token(int(unit)) for unit in of.units)

    text = (
        "Below is a conversation between the user and the agent. Each turn includes the user's speech and "
        "its corresponding transcript, along with the agent's response text and the corresponding speech.\n"
    )
    for one in run:
        text += f"\n### User\n{units(one.user)}{CORRESPOND_TOKEN}{one.user.text.lower()}"
        text += f"\n### Agent\n{one.agent.text.lower()}{CORRESPOND_TOKEN}{units(one.agent)}\n"
    ids = tokenizer.encode(text + "</s>").ids
    newline = tokenizer.encode("\n").ids[-1]
    newlines = [at for at, token in enumerate(ids) if token == newline]
    corresponds = [at for at, token in enumerate(ids) if token == SMALL.correspond_id]
    targets: set[int] = set()
    for number in range(len(run)):
        targets.update(range(newlines[5 * number + 4] + 1, newlines[5 * number + 5]))
        targets.update(range(corresponds[2 * number] + 1, newlines[5 * number + 3] + 1))
    return ids, sorted(targets)


texts = st.text("aBcdE tT'?!.,-<|>/suñß梦🙂\t0123456789", min_size=1, max_size=40)
turn_pairs = st.lists(
    st.tuples(texts, st.lists(st.integers(0, 19), min_size=1, max_size=6)), min_size=2, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(drawn=turn_pairs, multi_turn=st.booleans())
def test_ids_and_targets_as_the_original_counts_them(
    encoder: TextEncoder,
    whole_tokenizer: Tokenizer,
    drawn: list[tuple[str, list[int]]],
    multi_turn: bool,
) -> None:
    assume(not any(encoder.special_token_in(text.lower()) for text, _ in drawn))
    turns = [turn(str(number % 2), text, units) for number, (text, units) in enumerate(drawn)]
    template = DialogTemplate(encoder.encode, SMALL)
    for offset in (0, 1):
        run = exchanges(turns, offset)
        for some in [run] if multi_turn and run else [[one] for one in run]:
            sample = template.sample(some)
            ids, targets = original_ids_and_targets(whole_tokenizer, some)
            assert sample.tokens.tolist() == ids
            assert np.flatnonzero(sample.loss_mask).tolist() == targets


# --- turns into samples


def test_exchanges_of_both_offsets() -> None:
    turns = [turn(str(number % 2), f"text {number}") for number in range(5)]
    pairs = [
        [(one.user.text[-1], one.agent.text[-1]) for one in exchanges(turns, offset)] for offset in (0, 1)
    ]
    assert pairs == [[("0", "1"), ("2", "3")], [("1", "2"), ("3", "4")]]


def same(left: DialogSample, right: DialogSample) -> bool:
    return (
        left.tokens.tolist() == right.tokens.tolist()
        and left.loss_mask.tolist() == right.loss_mask.tolist()
        and left.turns == right.turns
    )


@settings(max_examples=60, deadline=None)
@given(drawn=turn_pairs.filter(lambda drawn: len(drawn) >= 4), seq_length=st.integers(1, 400))
def test_several_turns_fill_the_sequence_and_no_more(
    encoder: TextEncoder, drawn: list[tuple[str, list[int]]], seq_length: int
) -> None:
    template = DialogTemplate(encoder.encode, SMALL)
    run = exchanges([turn(str(n % 2), text, units) for n, (text, units) in enumerate(drawn)], 0)
    samples = list(template.samples(run, seq_length))
    first = 0
    for sample in samples:
        count = len(sample.turns) // 2
        assert same(sample, template.sample(run[first : first + count]))
        assert count == 1 or len(sample.tokens) <= seq_length
        if first + count < len(run):
            assert len(template.sample(run[first : first + count + 1]).tokens) > seq_length
        first += count
    assert first == len(run)


def test_two_turns_are_the_single_turn(encoder: TextEncoder) -> None:
    template = DialogTemplate(encoder.encode, SMALL)
    run = one_exchange(turn("a"), turn("b", "fine"))
    (sample,) = template.samples(run, 8192)
    assert same(sample, template.sample(run))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "fewer_than_2_turns"),
        ([turn("a")], "fewer_than_2_turns"),
        ([turn("a"), turn("b"), turn("b")], "speaker_twice_in_a_row"),
        ([turn("a"), turn("b", " \t")], "text_missing"),
        ([turn("a", "one\ntwo"), turn("b")], "line_end_in_text"),
        ([turn("a"), turn("b", units=[])], "units_missing"),
    ],
)
@pytest.mark.parametrize("multi_turn", [False, True])
def test_dialogs_that_the_template_cannot_hold(turns: list[Turn], reason: str, multi_turn: bool) -> None:
    with pytest.raises(Rejected) as caught:
        check_turns(turns, multi_turn=multi_turn)
    assert caught.value.reason == reason


def test_three_speakers_have_no_roles_in_several_turns() -> None:
    turns = [turn("a"), turn("b"), turn("c")]
    check_turns(turns, multi_turn=False)
    with pytest.raises(Rejected, match="more_than_2_speakers"):
        check_turns(turns, multi_turn=True)


def test_a_tokenizer_that_joins_line_ends_with_text_is_refused() -> None:
    def encode(text: str) -> list[int]:
        return [7 if piece == "\n" else len(piece) + 10 for piece in text.replace("?\n", "?").split(" ")]

    with pytest.raises(
        DataError, match="0 tokens for its 2 line ends; the dialog template needs a tokenizer"
    ):
        DialogTemplate(encode, SMALL)
