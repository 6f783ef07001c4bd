"""The samples of all parts: which are kept, which go to the test split, in which rows they stand.

    n = samples      T = tokens

Only lengths, groups and places are held in memory (28 bytes a sample, and what packing takes, or before it
what finding duplicates takes); tokens go from the memory-mapped parts into the store in blocks of bounded
size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from usdm_megatron.data.loss_mask import MASK_DTYPE, without_first_tokens
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.packing import Packing
from usdm_megatron.preprocess.part_files import Part
from usdm_megatron.preprocess.parts_plan import IdRule
from usdm_megatron.preprocess.samples import Rejection

DUPLICATE = "duplicate_id"
LISTED_REJECTIONS = 1000  # of a part, and of a report; all are counted
BLOCK_TOKENS = 1 << 22  # gathered at a time
_NAMED_IN_AN_ERROR = 20


@dataclass(frozen=True)
class MergedSamples:
    """All samples of some parts, in order: where they are, and what packing needs to know."""

    parts: list[Part]
    lengths: np.ndarray  # int32 [n]
    utterances: np.ndarray  # uint64 [n]
    groups: np.ndarray  # int32 [n]
    part_of_sample: np.ndarray  # int32 [n]
    starts: np.ndarray  # int64 [n], first token in its part

    @classmethod
    def of(cls, parts: list[Part]) -> MergedSamples:
        lengths = [part.arrays["lengths"] for part in parts]
        return cls(
            parts=parts,
            lengths=np.concatenate(lengths),
            utterances=np.concatenate([part.arrays["utterances"] for part in parts]),
            groups=np.concatenate([part.arrays["groups"] for part in parts]),
            part_of_sample=np.repeat(np.arange(len(parts), dtype=np.int32), list(map(len, lengths))),
            starts=np.concatenate([np.cumsum(some, dtype=np.int64) - some for some in lengths]),
        )

    @property
    def have_loss_mask(self) -> bool:
        return any("loss_mask" in part.arrays for part in self.parts)

    def without_duplicates(self, rule: IdRule, rejected: Rejected) -> np.ndarray:
        """int64 indices of the samples whose utterance is the first of its id; counts other utterances."""
        if rule == "any" or not len(self.lengths):
            return np.arange(len(self.lengths))
        epochs = self._joined("id_epochs")
        is_first = first_of_each(self._joined("ids"), epochs)
        # Epochs that other parts draw repeat what those of the first say; who was rejected has a reason.
        again = np.flatnonzero(~is_first & (epochs == 0) & (self._joined("is_rejected") == 0))
        ends = np.cumsum([len(part.arrays["ids"]) for part in self.parts])
        rejected.add(
            {DUPLICATE: len(again)} if len(again) else {},
            (self._duplicate(index, ends) for index in again.tolist()),
        )
        before = np.concatenate([[0], ends[:-1]])
        return np.flatnonzero(is_first[before[self.part_of_sample] + self._joined("occurrences")])

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([part.arrays[name] for part in self.parts])

    def _duplicate(self, index: int, ends: np.ndarray) -> Rejection:
        """Of the utterance `index`, counted over all parts; `ends` `[parts]` says how many each part ends."""
        number = int(np.searchsorted(ends, index, side="right"))
        arrays = self.parts[number].arrays
        within = index - int(ends[number])  # from the end of the part
        name_ends = arrays["name_ends"]
        begin = int(name_ends[within - 1]) if -within < len(name_ends) else 0
        name = arrays["names"][begin : int(name_ends[within])].tobytes().decode("utf-8", "surrogateescape")
        return Rejection(name, DUPLICATE, "the id comes again; the first utterance of an id is the one read")

    def append_rows(self, writer: TokenStoreWriter, packing: Packing) -> None:
        """Append the rows of `packing`, whose `order` counts samples of all parts."""
        tokens = [part.arrays["tokens"] for part in self.parts]
        masks = self._loss_masks() if self.have_loss_mask else None
        row_ends = np.cumsum(packing.row_tokens(self.lengths))
        first_row = 0
        while first_row < packing.rows:
            begun = int(row_ends[first_row - 1]) if first_row else 0
            end_row = max(first_row + 1, int(np.searchsorted(row_ends, begun + BLOCK_TOKENS, side="right")))
            row_starts = packing.row_starts[first_row : end_row + 1]
            chosen = packing.order[row_starts[0] : row_starts[-1]]
            writer.append(
                self._gather(tokens, chosen),
                self.lengths[chosen],
                np.diff(row_starts),
                loss_mask=None if masks is None else self._gather(masks, chosen),
            )
            first_row = end_row

    def _loss_masks(self) -> list[np.ndarray]:
        """The mask of every part; in one that has none, all tokens are targets."""
        return [
            part.arrays["loss_mask"]
            if "loss_mask" in part.arrays
            else without_first_tokens(np.ones(len(part.arrays["tokens"]), MASK_DTYPE), part.arrays["lengths"])
            for part in self.parts
        ]

    def _gather(self, values: list[np.ndarray], chosen: np.ndarray) -> np.ndarray:
        """What `values` (an array a part, aligned with its tokens) hold of the samples `chosen`, end to end.

        A view a sample and one concatenation: 5 x as fast as an index of all tokens at 600 tokens a
        sample, and 2 x at 30.
        """
        starts = self.starts[chosen]
        ends = starts + self.lengths[chosen]
        places = zip(self.part_of_sample[chosen].tolist(), starts.tolist(), ends.tolist(), strict=True)
        return np.concatenate([values[part][start:end] for part, start, end in places])


@dataclass
class Rejected:
    """Rejections so far: all counted, the first `LISTED_REJECTIONS` listed."""

    by_reason: Counter[str] = field(default_factory=Counter)
    listed: list[Rejection] = field(default_factory=list)

    def add_parts(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self.add(part.facts["rejected"], (Rejection(**record) for record in part.facts["listed"]))

    def add(self, by_reason: dict[str, int], rejections: Iterator[Rejection]) -> None:
        self.by_reason.update(by_reason)
        room = range(LISTED_REJECTIONS - len(self.listed))
        self.listed += [rejection for _, rejection in zip(room, rejections, strict=False)]

    def named(self) -> list[str]:
        """The first ones for an error message, and how many more there are."""
        return described(self.listed, self.by_reason.total())


def described(rejections: Sequence[Rejection], total: int) -> list[str]:
    """A line for each of the first rejections, and one for those that have none."""
    named = rejections[:_NAMED_IN_AN_ERROR]
    lines = [
        f"{one.where}: rejected, {one.reason}" + (f" ({one.detail})" if one.detail else "") for one in named
    ]
    return [*lines, f"… and {total - len(named)} more"] if total > len(named) else lines


def strict_error(rejections: Sequence[Rejection], total: int) -> DataError:
    """What `--strict` makes of rejections."""
    remedy = "--strict allows no rejection: mend the input, or leave the flag out"
    return DataError(*described(rejections, total), remedy)


def first_of_each(utterances: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """bool `[n]`: whether no earlier sample has the same utterance and group."""
    order = np.lexsort((groups, utterances))  # stable: equal ones stay in order
    by_utterance, by_group = utterances[order], groups[order]
    is_again = (by_utterance[1:] == by_utterance[:-1]) & (by_group[1:] == by_group[:-1])
    is_first = np.ones(len(utterances), dtype=np.bool_)
    is_first[order[1:][is_again]] = False
    return is_first


def in_test_split(utterances: np.ndarray, test_share: float, seed: int) -> np.ndarray:
    """bool `[n]`: a share of the utterances (rounded, at least one in each split) with all their samples.

    Which ones depends on the set of utterances and the seed, not on their order.
    """
    names, name_of_sample = np.unique(utterances, return_inverse=True)
    if len(names) < 2:
        raise DataError(f"--split: the input has {len(names)} utterances, the least is 2; leave the flag out")
    test_count = min(max(round(test_share * len(names)), 1), len(names) - 1)
    is_test = np.zeros(len(names), dtype=np.bool_)
    is_test[np.argsort(_mixed(names, seed))[:test_count]] = True
    return is_test[name_of_sample]


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of uint64 `[n]` (Steele et al. 2014): a permutation of all numbers, so ties cannot be."""
    state = numbers + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
