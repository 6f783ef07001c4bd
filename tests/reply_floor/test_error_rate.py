"""Edit distance against a plain dynamic programme, and error rates of cases done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.reply.error_rate import ErrorCount, edit_distance, total, unit_errors, word_errors


def plain_distance(one: list[int], other: list[int]) -> int:
    """Wagner and Fischer's table, cell by cell."""
    table = [[i + j for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, left in enumerate(one, start=1):
        for j, right in enumerate(other, start=1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (left != right))
    return table[-1][-1]


numbers = st.lists(st.integers(0, 4), max_size=14)


@settings(max_examples=300, deadline=None)
@given(one=numbers, other=numbers)
def test_the_plain_programme_says_the_same(one: list[int], other: list[int]) -> None:
    found = edit_distance(np.array(one, dtype=np.int32), np.array(other, dtype=np.int32))
    assert found == plain_distance(one, other)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [
        ("the river is cold", "the river is cold", 0),
        ("the river is cold", "the  river is\tcold ", 0),
        ("the river is cold", "the silver is cold", 1),
        ("the river is cold", "river is cold", 1),
        ("the river is cold", "the river is is cold", 1),
        ("the river is cold", "", 4),
        ("the river is cold", "is the river cold", 2),
        ("a\0 b", "a b", 1),
        ("a b", "c d e f g", 5),
    ],
)
def test_words_by_hand(reference: str, hypothesis: str, edits: int) -> None:
    assert word_errors(reference, hypothesis) == ErrorCount(edits, len(reference.split()))


def test_a_long_text_weighs_more() -> None:
    counts = [word_errors("a b c d e f g h", "a b c d e f g h"), word_errors("a b", "x y")]
    assert total(counts).rate == 0.2
    assert unit_errors(np.array([1, 2]), np.array([1, 2, 3, 4, 5])).rate == 1.5
    assert (ErrorCount().rate, ErrorCount(1, 0).rate) == (0.0, float("inf"))
