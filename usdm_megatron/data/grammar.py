"""USDM's token grammar, checked over a whole store.

A sample of the pre-training data (`interleave.py`) is

    bos, run, { mark, run }, eos        runs of text and of units in turn
                                        mark: <|continue|> or <|correspond|>

A fine-tuning sample (`dialog.py`) goes from its template's text to units, and back, without a mark: there,
in stores with a loss mask, text and units may touch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from usdm_megatron.data.token_runs import BLOCK_TOKENS, RowsOfStore, row_blocks, runs_of
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.vocab import (
    CONTINUE_TOKEN,
    CORRESPOND_TOKEN,
    PAD_TOKEN,
    TargetKind,
    Vocabulary,
    unit_token,
)

_PAD = len(TargetKind)  # a kind of its own here; losses count it as text
_OUTSIDE = 255  # the neighbour of a run that begins or ends its sample
_IS_MODALITY = np.isin(np.arange(256), (TargetKind.TEXT, TargetKind.UNIT))
_TOKENS_AROUND = 2  # shown on either side of an offending token


class Rule(enum.Enum):
    """What holds for every sample, as a sentence."""

    MISSING_BOS = "a sample begins with bos"
    BOS_INSIDE = "bos stands nowhere else in a sample"
    MISSING_EOS = "a sample ends with eos"
    EOS_INSIDE = "eos stands nowhere else in a sample"
    EMPTY_SAMPLE = "a sample holds text or units"
    PAD = f"{PAD_TOKEN} stands in no sample"
    CONTINUE = f"{CONTINUE_TOKEN} stands only where text and units meet"
    CORRESPOND = f"{CORRESPOND_TOKEN} stands only where text and units meet"
    UNMARKED_SWITCH = f"text and units meet only at {CONTINUE_TOKEN} or {CORRESPOND_TOKEN}"

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Offence:
    """Where a rule is broken; everything is counted from 0."""

    rule: Rule
    row: int  # of the store
    sample: int  # of the row
    position: int  # of the sample
    token_id: int
    around: str  # the token in brackets, between its neighbours of the row


@dataclass(frozen=True)
class GrammarReport:
    """What a check found. A stretch of one kind of token breaks a rule once, where it begins to."""

    count_by_rule: dict[Rule, int]  # of the rules that were checked
    offending_rows: int
    offending_samples: int
    first: tuple[Offence, ...]  # in the order of the store

    @property
    def offences(self) -> int:
        return sum(self.count_by_rule.values())


def rules_for(store: TokenStore) -> tuple[Rule, ...]:
    """All rules; for a fine-tuning store all but the one that its template breaks."""
    masked = store.summary.loss_mask is not None
    return tuple(rule for rule in Rule if not (masked and rule is Rule.UNMARKED_SWITCH))


def check_grammar(store: TokenStore, *, listed: int = 10, block_tokens: int = BLOCK_TOKENS) -> GrammarReport:
    """Check every sample of `store` and describe the first `listed` offences; one pass, bounded memory.

    Raises `DataError` for ids outside the vocabulary.
    """
    rules, vocabulary = rules_for(store), store.summary.vocabulary
    counts = dict.fromkeys(rules, 0)
    rows = samples = 0
    first: list[Offence] = []
    for block in row_blocks(store, block_tokens):
        broken = broken_rules(block, vocabulary)
        for rule in rules:
            counts[rule] += len(broken[rule])
        positions = np.concatenate([broken[rule] for rule in rules])
        if len(positions) == 0:
            continue
        rows += len(np.unique(_last_at_most(block.row_starts(), positions)))
        samples += len(np.unique(_last_at_most(block.sample_starts(), positions)))
        which = np.repeat(np.arange(len(rules)), [len(broken[rule]) for rule in rules])
        for at in np.argsort(positions, kind="stable")[: listed - len(first)]:
            first.append(_offence(rules[which[at]], int(positions[at]), block, vocabulary))
    return GrammarReport(counts, rows, samples, tuple(first))


def broken_rules(block: RowsOfStore, vocabulary: Vocabulary) -> dict[Rule, np.ndarray]:
    """Tokens of the block (int64, rising) at which each rule is broken."""
    runs = runs_of(block, _kind_table(vocabulary))
    kinds, starts, lengths = runs.kinds, runs.starts, runs.lengths
    first = runs.first_runs
    last = np.append(first[1:], len(kinds)) - 1
    is_first, is_last = np.zeros((2, len(kinds)), dtype=np.bool_)
    is_first[first] = is_last[last] = True
    before = np.where(is_first, _OUTSIDE, np.roll(kinds, 1))
    after = np.where(is_last, _OUTSIDE, np.roll(kinds, -1))
    is_modality = _IS_MODALITY[kinds]
    joins = _IS_MODALITY[before] & _IS_MODALITY[after] & (before != after) & (lengths == 1)
    is_bos, is_eos = kinds == TargetKind.BOS, kinds == TargetKind.EOS
    ends = starts + lengths - 1
    return {
        Rule.MISSING_BOS: starts[is_first & ~is_bos],
        # Of a run at its sample's edge one token is in its place.
        Rule.BOS_INSIDE: (starts + is_first)[is_bos & (lengths > is_first)],
        Rule.MISSING_EOS: ends[is_last & ~is_eos],
        Rule.EOS_INSIDE: starts[is_eos & (lengths > is_last)],
        Rule.EMPTY_SAMPLE: starts[first[~np.logical_or.reduceat(is_modality, first)]],
        Rule.PAD: starts[kinds == _PAD],
        Rule.CONTINUE: starts[(kinds == TargetKind.CONTINUE) & ~joins],
        Rule.CORRESPOND: starts[(kinds == TargetKind.CORRESPOND) & ~joins],
        Rule.UNMARKED_SWITCH: starts[is_modality & _IS_MODALITY[before]],
    }


def token_name(vocabulary: Vocabulary, token_id: int) -> str:
    """A token without its tokenizer: `bos`, `<|continue|>`, `<|unit5|>`; text as its id."""
    names = {vocabulary.bos_id: "bos", vocabulary.eos_id: "eos"}
    if vocabulary.has_speech:
        names |= {vocabulary.continue_id: CONTINUE_TOKEN, vocabulary.correspond_id: CORRESPOND_TOKEN}
        names |= {vocabulary.pad_id: PAD_TOKEN}
        if vocabulary.first_unit_id <= token_id < vocabulary.pad_id:
            return unit_token(token_id - vocabulary.first_unit_id)
    return names.get(token_id, str(token_id))


def _kind_table(vocabulary: Vocabulary) -> np.ndarray:
    kinds = vocabulary.kind_of_id()
    if vocabulary.has_speech:
        kinds[vocabulary.pad_id] = _PAD
    return kinds


def _offence(rule: Rule, at: int, block: RowsOfStore, vocabulary: Vocabulary) -> Offence:
    row_starts, sample_starts = block.row_starts(), block.sample_starts()
    row, sample = (int(_last_at_most(starts, at)) for starts in (row_starts, sample_starts))
    row_start = int(row_starts[row])
    row_end = row_start + int(block.row_lengths[row])
    around = range(max(row_start, at - _TOKENS_AROUND), min(row_end, at + _TOKENS_AROUND + 1))
    names = [token_name(vocabulary, token_id) for token_id in block.tokens[around].tolist()]
    names[at - around[0]] = f"[{names[at - around[0]]}]"
    return Offence(
        rule=rule,
        row=block.first_row + row,
        sample=sample - int(np.searchsorted(sample_starts, row_start)),
        position=at - int(sample_starts[sample]),
        token_id=int(block.tokens[at]),
        around=" ".join(names),
    )


def _last_at_most(starts: np.ndarray, positions: np.ndarray | int) -> np.ndarray:
    """Index of the last of `starts` (rising) that is not above each position."""
    return np.searchsorted(starts, positions, side="right") - 1
