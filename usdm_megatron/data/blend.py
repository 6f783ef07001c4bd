"""Several token stores read as one: which row of which store is row n, by weight and in order.

The stores are the leaves of a binary tree. Of the first m rows that reach a fork of weights a and b,
round(m a / (a + b)) go to its left and the rest to its right, so a row's side, and its number there,
follow from m alone: whole numbers, no index and no state, however many rows there are. (Megatron-LM's
`build_blending_indices` fills an index of the same kind row by row.)

The lightest are joined first (Huffman's tree), which keeps a store close to its weight at *every* prefix:
within 1/2 row in a blend of two, 1 of three, 1.7 of any number. A fork's 1/2 reaches a store shrunk by
its part of that branch, and branches grow upwards at least as Fibonacci's numbers do: 1.7 > half of
1 + 1 + 1/2 + 1/3 + 1/5 + ….

An epoch of a blend is the longest prefix for which no store is too short. It ends where the first store
does; what the others have left then is unread, and the next epoch begins every store anew.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from usdm_megatron.data.token_store import PackedRow, TokenStore
from usdm_megatron.errors import DataError


@dataclass(frozen=True)
class RowPlace:
    """A row of a blend: number `row` of the store at index `store`."""

    store: int
    row: int


@dataclass(frozen=True)
class _Leaf:
    weight: int
    store: int


@dataclass(frozen=True)
class _Fork:
    left: _Leaf | _Fork
    right: _Leaf | _Fork
    weight: int  # of both

    def of_left(self, rows: int) -> int:
        """How many of the first `rows` go left: the share, rounded to the nearest, halves up."""
        return (2 * rows * self.left.weight + self.weight) // (2 * self.weight)


@dataclass(frozen=True)
class BlendOrder:
    """The order in which stores of these weights take turns: arithmetic alone.

    `weights` are whole numbers without a common factor. After every sum(weights) rows each store has
    given exactly its weight in rows, so weights that are row counts read every row once.
    """

    weights: tuple[int, ...]
    root: _Leaf | _Fork

    @classmethod
    def of(cls, weights: Sequence[Fraction]) -> BlendOrder:
        """From positive weights in any unit; only their ratios count."""
        unit = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * unit) for weight in weights]
        divisor = math.gcd(*whole)
        whole = [weight // divisor for weight in whole]
        return cls(tuple(whole), _join(whole))

    def place(self, row_id: int) -> RowPlace:
        """Where row `row_id`, counted from 0, comes from."""
        node, row = self.root, row_id
        while isinstance(node, _Fork):
            left = node.of_left(row)
            goes_left = node.of_left(row + 1) > left
            node, row = (node.left, left) if goes_left else (node.right, row - left)
        return RowPlace(node.store, row)

    def counts(self, rows: int) -> tuple[int, ...]:
        """How many of the first `rows` each store gives."""
        return tuple(count for _, count in sorted(_counts(self.root, rows)))

    def epoch_rows(self, store_rows: Sequence[int]) -> int:
        """The longest prefix that takes no more than `store_rows` of each store."""

        def is_too_long(rows: int) -> bool:
            return any(count > most for count, most in zip(self.counts(rows), store_rows, strict=True))

        return bisect_right(range(sum(store_rows) + 1), False, key=is_too_long) - 1


def _join(weights: Sequence[int]) -> _Leaf | _Fork:
    """Huffman's tree; ties are decided by the order of the stores."""
    heap: list[tuple[int, int, _Leaf | _Fork]] = [
        (weight, store, _Leaf(weight, store)) for store, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        (first, store, left), (second, other, right) = heapq.heappop(heap), heapq.heappop(heap)
        joined = _Fork(left, right, first + second)
        heapq.heappush(heap, (joined.weight, min(store, other), joined))
    return heap[0][2]


def _counts(node: _Leaf | _Fork, rows: int) -> Iterator[tuple[int, int]]:
    if isinstance(node, _Leaf):
        yield node.store, rows
    else:
        left = node.of_left(rows)
        yield from _counts(node.left, left)
        yield from _counts(node.right, rows - left)


@dataclass(frozen=True)
class StoreShare:
    """What an epoch of a blend takes of one store."""

    prefix: str
    share: float  # of the blend's rows, by weight
    rows_read: int
    rows: int  # of the store

    def __str__(self) -> str:
        return f"{self.share:.2%} {self.prefix}: {self.rows_read:,} of its {self.rows:,} rows an epoch"


@dataclass(frozen=True)
class Blend:
    """Token stores interleaved by weight; to training it is a `TokenStore` of `rows` rows, an epoch's."""

    stores: tuple[TokenStore, ...]
    order: BlendOrder
    rows: int

    @property
    def prefix(self) -> str:
        """The blend as `--train-data-path` takes it, in whole weights."""
        pairs = zip(self.order.weights, self.stores, strict=True)
        return " ".join(f"{weight} {store.prefix}" for weight, store in pairs)

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        counts = self.order.counts(self.rows)
        pairs = zip(self.stores, counts, strict=True)
        return sum(int(store.row_lengths()[:count].sum()) for store, count in pairs)

    @property
    def identity(self) -> str:
        """A hash of the weights and of the stores' content, in order: equal for equal rows in equal order."""
        pairs = zip(self.order.weights, self.stores, strict=True)
        text = " ".join(["blend 1", *(f"{weight} {store.identity}" for weight, store in pairs)])
        return hashlib.sha256(text.encode()).hexdigest()

    def place(self, row_id: int) -> RowPlace:
        """The store and the row there of row `row_id`; `IndexError` outside the epoch."""
        if not 0 <= row_id < self.rows:
            raise IndexError(f"{self.prefix}: row {row_id} of {self.rows}")
        return self.order.place(row_id)

    def row(self, row_id: int) -> PackedRow:
        """Row `row_id`, counted from 0; `IndexError` outside the epoch (no negative indices)."""
        place = self.place(row_id)
        return self.stores[place.store].row(place.row)


TrainRows = TokenStore | Blend  # what a run reads: both have rows, tokens, prefix, identity and row()


def stores_of(source: TrainRows) -> tuple[TokenStore, ...]:
    """The store itself, or those of a blend."""
    return source.stores if isinstance(source, Blend) else (source,)


def place_of(source: TrainRows, row_id: int) -> RowPlace:
    """Which of `stores_of(source)` row `row_id` comes from, and its number there."""
    return source.place(row_id) if isinstance(source, Blend) else RowPlace(0, row_id)


def samples_per_row(source: TrainRows) -> float:
    """Mean samples of a row; of a blend by its shares, as if rows of a store were alike."""
    stores = stores_of(source)
    weights = source.order.weights if isinstance(source, Blend) else (1,)
    pairs = zip(stores, weights, strict=True)
    return sum(weight * store.summary.samples / store.rows for store, weight in pairs) / sum(weights)


def shares_of(source: TrainRows) -> tuple[StoreShare, ...]:
    """What an epoch of a blend takes of each store; empty for a single store, which is read whole."""
    if not isinstance(source, Blend):
        return ()
    weights = source.order.weights
    counts = source.order.counts(source.rows)
    return tuple(
        StoreShare(store.prefix, weight / sum(weights), count, store.rows)
        for store, weight, count in zip(source.stores, weights, counts, strict=True)
    )


def open_rows(prefixes: Sequence[str], weights: Sequence[Fraction]) -> TrainRows:
    """Open the stores `prefixes`, interleaved by `weights` if there are several.

    Raises `DataError` with every store that is not whole, or not of a kind with the first.
    """
    stores: list[TokenStore] = []
    problems: list[str] = []
    for prefix in prefixes:
        try:
            stores.append(TokenStore.open(prefix))
        except DataError as error:
            problems += error.problems
    problems = problems or _disagreements(stores)
    if problems:
        raise DataError(*problems)
    if len(stores) == 1:
        return stores[0]
    order = BlendOrder.of(weights)
    blend = Blend(tuple(stores), order, order.epoch_rows([store.rows for store in stores]))
    unread = [
        f"{share.prefix}: its weight, {share.share:.2g} of all, reads none of its {share.rows:,} rows in an "
        f"epoch of {blend.rows:,}; raise the weight, or leave the store out"
        for share in shares_of(blend)
        if not share.rows_read
    ]
    if unread:
        raise DataError(*unread)
    return blend


def _disagreements(stores: Sequence[TokenStore]) -> list[str]:
    """Why these stores are no blend: each against the first one that it differs from."""
    problems = []
    for index, store in enumerate(stores):
        for other in stores[:index]:
            if why := _disagreement(store, other):
                problems.append(f"{store.prefix} and {other.prefix} cannot be blended: {why}")
                break
    return problems


def _disagreement(store: TokenStore, other: TokenStore) -> str | None:
    own, others = store.summary, other.summary
    if own.vocabulary != others.vocabulary:
        return (
            f"the one was made for {own.vocabulary.to_dict()}, the other for {others.vocabulary.to_dict()}; "
            "the same ids would mean other tokens: preprocess both for one model"
        )
    hashes = (own.tokenizer_sha256, others.tokenizer_sha256)
    if None not in hashes and hashes[0] != hashes[1]:
        return (
            f"they were made with different tokenizers (sha256 {str(hashes[0])[:12]}… and "
            f"{str(hashes[1])[:12]}…); preprocess both with the same"
        )
    if store.identity == other.identity:
        return "they hold the same rows; name one of them, with the sum of the weights"
    return None
