"""The token grammar against two plain oracles, on what the product writes, and on damage of every kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.corpora.alignment import WordSpan
from usdm_megatron.corpora.dialog import DialogTemplate, Turn, exchanges
from usdm_megatron.corpora.interleave import interleave, sample_generator
from usdm_megatron.data.grammar import Offence, Rule, broken_rules, check_grammar, rules_for, token_name
from usdm_megatron.data.token_runs import RowsOfStore
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.errors import DataError
from usdm_megatron.tokenizer.text_encoder import TextEncoder
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

V = Vocabulary(text_size=20, unit_count=7)
# Samples as words: b(os) e(os) t(ext) u(nit) c(ontinue) r (correspond) p(ad)
IDS = {"b": V.bos_id, "e": V.eos_id, "t": 9, "u": V.first_unit_id + 3}
IDS |= {"c": V.continue_id, "r": V.correspond_id, "p": V.pad_id}
INTERLEAVED = re.compile(
    "b(t+([cr]u+[cr]t+)*([cr]u+)?|u+([cr]t+[cr]u+)*([cr]t+)?)e"  # runs in turn, a mark between any two
)
DIALOG = re.compile("b([tu]|(?<=t)[cr](?=u)|(?<=u)[cr](?=t))+e")
Found = set[tuple[Rule, int, int]]  # rule, sample, position


def oracle(sample: str) -> set[tuple[Rule, int]]:
    """One letter after the other, looking at its neighbours."""
    found = set()
    if sample[0] != "b":
        found.add((Rule.MISSING_BOS, 0))
    if sample[-1] != "e":
        found.add((Rule.MISSING_EOS, len(sample) - 1))
    if not {"t", "u"} & set(sample):
        found.add((Rule.EMPTY_SAMPLE, 0))
    for at, letter in enumerate(sample):
        before = sample[at - 1] if at else ""
        after = sample[at + 1] if at + 1 < len(sample) else ""
        goes_on = before == letter
        if letter == "b" and at and (at == 1 or not goes_on):
            found.add((Rule.BOS_INSIDE, at))
        if letter == "e" and after and not goes_on:
            found.add((Rule.EOS_INSIDE, at))
        if letter == "p" and not goes_on:
            found.add((Rule.PAD, at))
        if letter in "cr" and not goes_on and {before, after} != {"t", "u"}:
            found.add((Rule.CONTINUE if letter == "c" else Rule.CORRESPOND, at))
        if {before, letter} == {"t", "u"}:
            found.add((Rule.UNMARKED_SWITCH, at))
    return found


def check(samples: Sequence[Sequence[int]], vocabulary: Vocabulary = V) -> Found:
    """What `broken_rules` finds in one row of these samples."""
    lengths = np.array([len(sample) for sample in samples])
    tokens = np.concatenate([np.array(sample) for sample in samples])
    block = RowsOfStore(0, np.array([len(tokens)]), lengths, tokens, None)
    ends = np.cumsum(lengths)
    found = set()
    for rule, positions in broken_rules(block, vocabulary).items():
        assert np.all(np.diff(positions) > 0)
        for at in positions.tolist():
            sample = int(np.argmax(ends > at))
            found.add((rule, sample, at - int(ends[sample] - lengths[sample])))
    return found


def ids(sample: str) -> list[int]:
    return [IDS[letter] for letter in sample]


# Words of the language and such as are nearly: half of all random words would only miss their bos.
NEARLY = st.lists(st.sampled_from("ttuuccrrbep"), max_size=12).map(lambda body: f"b{''.join(body)}e")
ANY = st.text("beturcp", min_size=1, max_size=8)
LEGAL = st.from_regex(INTERLEAVED, fullmatch=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(NEARLY | ANY | LEGAL, min_size=1, max_size=5))
def test_against_the_oracles(samples: list[str]) -> None:
    found = check([ids(sample) for sample in samples])
    assert found == {(rule, n, at) for n, sample in enumerate(samples) for rule, at in oracle(sample)}
    for number, sample in enumerate(samples):
        rules = {rule for rule, of_sample, _ in found if of_sample == number}
        assert bool(INTERLEAVED.fullmatch(sample)) == (not rules)
        assert bool(DIALOG.fullmatch(sample)) == (not rules - {Rule.UNMARKED_SWITCH})


# --- what the product writes


def encode(text: str) -> list[int]:
    return [5 + len(word) for word in text.split(" ")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=3, max_size=25), st.integers(0, 2**32))
def test_interleaved_samples_pass(word_units: list[int], seed: int) -> None:
    ends = np.cumsum(word_units).tolist()
    spans = [WordSpan("w", end - units, end) for end, units in zip(ends, word_units, strict=True)]
    units = np.random.default_rng(seed).integers(0, V.unit_count, ends[-1]) + V.first_unit_id
    samples = [interleave(spans, units, encode, V, sample_generator(seed, epoch, "u")) for epoch in range(4)]
    assert check([sample.tolist() for sample in samples]) == set()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> DialogTemplate:
    encoder = TextEncoder(write_mistral_tokenizer(tmp_path_factory.mktemp("mistral")))
    return DialogTemplate(encoder.encode, USDM_VOCABULARY)


@pytest.mark.parametrize("turns", [2, 6])
def test_dialogs_break_only_the_rule_that_is_waived(template: DialogTemplate, turns: int) -> None:
    some = [Turn("AB"[n % 2], f"turn {n}", np.array([n, 5, 6], dtype=np.int32)) for n in range(turns)]
    sample = template.sample(exchanges(some, 0))
    found = check([sample.tokens.tolist()], USDM_VOCABULARY)
    assert [rule for rule, *_ in found] == [Rule.UNMARKED_SWITCH] * turns  # to and from units, an exchange


def test_dialogs_of_the_original() -> None:
    golden = json.loads((Path(__file__).parents[1] / "data" / "dialog_golden.json").read_text())
    found = check([sample["ids"] for sample in golden["samples"]], USDM_VOCABULARY)
    assert {rule for rule, *_ in found} == {Rule.UNMARKED_SWITCH}


# --- one token is enough

VALID = "btttcuuuurttte"
MUTATIONS = [
    (VALID[1:], {(Rule.MISSING_BOS, 0)}),
    ("b" + VALID, {(Rule.BOS_INSIDE, 1)}),
    ("bttbtcuuuurttte", {(Rule.BOS_INSIDE, 3)}),
    (VALID[:-1], {(Rule.MISSING_EOS, 12)}),
    (VALID + "e", {(Rule.EOS_INSIDE, 13)}),
    ("btttcueuuurttte", {(Rule.EOS_INSIDE, 6)}),
    (VALID + "t", {(Rule.EOS_INSIDE, 13), (Rule.MISSING_EOS, 14)}),
    (VALID + "p", {(Rule.EOS_INSIDE, 13), (Rule.MISSING_EOS, 14), (Rule.PAD, 14)}),
    ("bttptcuuuurttte", {(Rule.PAD, 3)}),
    ("btctcuuuurttte", {(Rule.CONTINUE, 2)}),
    ("btttcuuucuurttte", {(Rule.CONTINUE, 8)}),
    ("bctttcuuuurttte", {(Rule.CONTINUE, 1)}),
    ("btttcuuuurtttce", {(Rule.CONTINUE, 13)}),
    ("btttccuuuurttte", {(Rule.CONTINUE, 4)}),
    ("brtttcuuuurttte", {(Rule.CORRESPOND, 1)}),
    ("btttcuuruurttte", {(Rule.CORRESPOND, 7)}),
    ("btttcuuuurttrte", {(Rule.CORRESPOND, 12)}),
    ("btttcuuuurrttte", {(Rule.CORRESPOND, 9)}),
    ("btttcruuuurttte", {(Rule.CONTINUE, 4), (Rule.CORRESPOND, 5)}),
    ("btttuuuurttte", {(Rule.UNMARKED_SWITCH, 4)}),
    ("btttcuuuuttte", {(Rule.UNMARKED_SWITCH, 9)}),
    ("bttucuuuurttte", {(Rule.UNMARKED_SWITCH, 3), (Rule.CONTINUE, 4)}),
    ("be", {(Rule.EMPTY_SAMPLE, 0)}),
    ("bce", {(Rule.EMPTY_SAMPLE, 0), (Rule.CONTINUE, 1)}),
]


@pytest.mark.parametrize(("sample", "broken"), MUTATIONS, ids=[sample for sample, _ in MUTATIONS])
def test_one_token_is_caught_by_its_rule(sample: str, broken: set[tuple[Rule, int]]) -> None:
    assert check([ids(VALID)]) == set()
    neighbours = [ids(VALID), ids(sample), ids(VALID)]  # the damage is this sample's alone
    assert check(neighbours) == {(rule, 1, at) for rule, at in broken}


def test_a_text_vocabulary_knows_bos_and_eos_only() -> None:
    text = Vocabulary(text_size=20, unit_count=0)
    assert check([[1, 5, 19, 2]], text) == set()
    assert check([[5, 2, 2], [1, 1, 2]], text) == {
        (Rule.MISSING_BOS, 0, 0),
        (Rule.EOS_INSIDE, 0, 1),
        (Rule.BOS_INSIDE, 1, 1),
        (Rule.EMPTY_SAMPLE, 1, 0),
    }


def test_extra_tokens_are_text() -> None:
    extra = Vocabulary(text_size=20, unit_count=7, extra_tokens=("<|laugh|>",))
    laugh = extra.pad_id + 1
    assert check([[1, laugh, extra.continue_id, extra.first_unit_id, 2]], extra) == set()
    assert check([[1, laugh, extra.first_unit_id, 2]], extra) == {(Rule.UNMARKED_SWITCH, 0, 2)}


# --- stores

ROWS = ["btcue bte", "bue", "btcte be ue", "btte", "btue bppe"]


def as_rows(rows: Sequence[str]) -> list[list[list[int]]]:
    return [[ids(sample) for sample in row.split()] for row in rows]


@pytest.mark.parametrize("block_tokens", [1, 7, 12, 1000])
def test_offences_have_their_place(write_store: Callable[..., TokenStore], block_tokens: int) -> None:
    store = write_store(as_rows(ROWS), vocabulary=V)
    report = check_grammar(store, listed=4, block_tokens=block_tokens)
    expected = {
        Rule.CONTINUE: 1,
        Rule.EMPTY_SAMPLE: 2,
        Rule.MISSING_BOS: 1,
        Rule.PAD: 1,
        Rule.UNMARKED_SWITCH: 1,
    }
    assert {rule: count for rule, count in report.count_by_rule.items() if count} == expected
    assert (report.offences, report.offending_rows, report.offending_samples) == (6, 2, 5)
    assert report.first == (
        Offence(Rule.CONTINUE, 2, 0, 2, V.continue_id, "bos 9 [<|continue|>] 9 eos"),
        Offence(Rule.EMPTY_SAMPLE, 2, 1, 0, V.bos_id, "9 eos [bos] eos <|unit3|>"),
        Offence(Rule.MISSING_BOS, 2, 2, 0, IDS["u"], "bos eos [<|unit3|>] eos"),
        Offence(Rule.UNMARKED_SWITCH, 4, 0, 2, IDS["u"], "bos 9 [<|unit3|>] eos bos"),
    )
    assert check_grammar(store, listed=0, block_tokens=block_tokens).first == ()
    assert len(check_grammar(store, block_tokens=block_tokens).first) == 6


@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.lists(NEARLY | LEGAL, min_size=1, max_size=4), min_size=1, max_size=8), data=st.data()
)
def test_block_sizes_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], data: st.DataObject
) -> None:
    prefix = tmp_path_factory.mktemp("blocks") / "P"
    samples = [ids(sample) for row in rows for sample in row]
    with TokenStoreWriter(prefix, V, row_capacity=1000) as writer:
        lengths = np.array([len(sample) for sample in samples])
        writer.append(np.concatenate(samples), lengths, np.array([len(row) for row in rows]))
        writer.finish()
    store = TokenStore.open(prefix)
    whole = check_grammar(store, listed=100)
    assert check_grammar(store, listed=100, block_tokens=data.draw(st.integers(1, 60))) == whole
    found = {(offence.rule, offence.row, offence.sample, offence.position) for offence in whole.first}
    assert found == {
        (rule, row, number, at)
        for row, row_samples in enumerate(rows)
        for number, sample in enumerate(row_samples)
        for rule, at in oracle(sample)
    }
    assert whole.offending_samples == sum(bool(oracle(sample)) for row in rows for sample in row)
    assert whole.offending_rows == sum(any(map(oracle, row)) for row in rows)


def test_a_loss_mask_waives_one_rule(tmp_path: Path) -> None:
    sample = np.array(ids("btturttue"))
    for masked in (False, True):
        with TokenStoreWriter(
            tmp_path / "P", V, row_capacity=20, overwrite=True, with_loss_mask=masked
        ) as writer:
            mask = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0], dtype=np.uint8) if masked else None
            writer.append(sample, np.array([9]), np.array([1]), loss_mask=mask)
            writer.finish()
        store = TokenStore.open(tmp_path / "P")
        assert (Rule.UNMARKED_SWITCH in rules_for(store)) == (not masked)
        assert check_grammar(store).offences == (0 if masked else 2)


def test_ids_outside_the_vocabulary(write_store: Callable[..., TokenStore]) -> None:
    store = write_store(as_rows(ROWS), vocabulary=V)
    path = Path(f"{store.prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2] + np.array([V.size], dtype="<u2").tobytes())
    with pytest.raises(DataError, match=r"\.bin: holds ids outside its vocabulary of 30"):
        check_grammar(TokenStore.open(store.prefix))


def test_names_of_tokens() -> None:
    names = {letter: token_name(V, token_id) for letter, token_id in IDS.items()}
    assert names == {
        "b": "bos",
        "e": "eos",
        "t": "9",
        "u": "<|unit3|>",
        "c": "<|continue|>",
        "r": "<|correspond|>",
        "p": "<pad>",
    }
