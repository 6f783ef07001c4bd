"""`inspect store`: figures against plain counting, lines, JSON, the picture, exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from usdm_megatron.cli import main
from usdm_megatron.data.grammar import check_grammar
from usdm_megatron.data.inspect_store import describe, inspect_store
from usdm_megatron.data.loss_mask import without_first_tokens
from usdm_megatron.data.store_statistics import Pattern, count_tokens
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.vocab import TargetKind, Vocabulary

V = Vocabulary(text_size=20, unit_count=7)
BOS, EOS, C, R, U = V.bos_id, V.eos_id, V.continue_id, V.correspond_id, V.first_unit_id
ROWS = [
    [[BOS, 5, 6, EOS], [BOS, U, U + 1, C, 7, EOS], [BOS, U + 6, EOS]],
    [[BOS, 5, R, U, EOS], [BOS, 5, R, U, C, 5, 5, EOS]],
    [[BOS, 5, U, EOS], [BOS, EOS], [BOS, 9, EOS]],
]
needs_matplotlib = pytest.mark.skipif(
    not importlib.util.find_spec("matplotlib"), reason="needs matplotlib (extra plot)"
)


@pytest.fixture
def masked_store(tmp_path: Path) -> TokenStore:
    """`ROWS` with random targets, none of them in row 1."""
    rng = np.random.default_rng(0)
    with TokenStoreWriter(tmp_path / "masked", V, row_capacity=100, with_loss_mask=True) as writer:
        for number, row in enumerate(ROWS):
            tokens = np.concatenate([np.array(sample) for sample in row])
            lengths = np.array([len(sample) for sample in row])
            mask = without_first_tokens(rng.integers(0, 2, len(tokens)) * (number != 1), lengths)
            writer.append(tokens, lengths, np.array([len(row)]), loss_mask=mask)
        writer.finish()
    return TokenStore.open(tmp_path / "masked")


def inspect(*arguments: object) -> int:
    return main(["inspect", "store", *map(str, arguments)])


def words_of(printed: str) -> list[str]:
    return [" ".join(line.split()) for line in printed.splitlines()]


# --- figures


def kind_of(token_id: int, vocabulary: Vocabulary) -> TargetKind:
    named = {vocabulary.bos_id: TargetKind.BOS, vocabulary.eos_id: TargetKind.EOS}
    named |= {vocabulary.continue_id: TargetKind.CONTINUE, vocabulary.correspond_id: TargetKind.CORRESPOND}
    is_unit = vocabulary.first_unit_id <= token_id < vocabulary.pad_id
    return named.get(token_id, TargetKind.UNIT if is_unit else TargetKind.TEXT)


def pattern_of(sample: Sequence[int], vocabulary: Vocabulary) -> Pattern:
    kinds = {kind_of(token_id, vocabulary) for token_id in sample} - {TargetKind.BOS, TargetKind.EOS}
    marks = kinds & {TargetKind.CONTINUE, TargetKind.CORRESPOND}
    if len(marks) == 2:
        return Pattern.CONTINUE_AND_CORRESPOND
    if marks:
        return Pattern.CONTINUE if TargetKind.CONTINUE in marks else Pattern.CORRESPOND
    by_modalities = {0: Pattern.EMPTY, 2: Pattern.UNMARKED}
    one = Pattern.TEXT_ONLY if TargetKind.TEXT in kinds else Pattern.UNIT_ONLY
    return by_modalities.get(len(kinds), one)


@pytest.mark.parametrize("block_tokens", [1, 30, 100_000])
def test_figures_against_plain_counting(
    make_rows: Callable[..., Any], write_store: Callable[..., TokenStore], block_tokens: int
) -> None:
    rows = [*ROWS, *make_rows(60, seed=3)]
    store = write_store(rows, row_capacity=32)
    found = count_tokens(store, block_tokens)
    samples = list(chain.from_iterable(rows))
    tokens = list(chain.from_iterable(samples))
    kinds = Counter(kind_of(token_id, V) for token_id in tokens)
    assert found.tokens_by_kind == {kind: kinds[kind] for kind in TargetKind}
    patterns = Counter(pattern_of(sample, V) for sample in samples)
    assert found.samples_by_pattern == {pattern: patterns[pattern] for pattern in Pattern}
    assert set(patterns) == set(Pattern)  # none is left to chance
    assert found.largest_id == max(tokens)
    in_use = {kind: {t for t in tokens if kind_of(t, V) is kind} for kind in TargetKind}
    assert found.text_ids_in_use == len(in_use[TargetKind.TEXT])
    assert found.units_in_use == len(in_use[TargetKind.UNIT])
    assert found.targets_by_kind is None and found.rows_without_target is None
    row_lengths = [sum(map(len, row)) for row in rows]
    for lengths, expected in (
        (found.sample_lengths, [len(sample) for sample in samples]),
        (found.row_lengths, row_lengths),
    ):
        assert (lengths.shortest, lengths.longest) == (min(expected), max(expected))
        assert lengths.mean == pytest.approx(statistics.fmean(expected))
        assert lengths.median == statistics.median(expected)
        hundredths = statistics.quantiles(expected, n=100, method="inclusive")
        assert (lengths.percentile_90, lengths.percentile_99) == pytest.approx(
            (hundredths[89], hundredths[98])
        )
        spans = zip(lengths.edges, lengths.edges[1:], strict=False)
        assert lengths.counts == tuple(sum(low <= n < high for n in expected) for low, high in spans)
        assert sum(lengths.counts) == len(expected)
    assert found.row_lengths.edges == (1, 4, 7, 10, 13, 17, 20, 23, 26, 29, 33)  # tenths of 32
    assert found.sample_lengths.edges[:3] == (2, 4, 8)


def test_targets_by_kind(masked_store: TokenStore) -> None:
    counts: Counter[TargetKind] = Counter()
    for row_id in range(masked_store.rows):
        row = masked_store.row(row_id)
        assert row.loss_mask is not None
        masked = zip(row.tokens.tolist(), row.loss_mask.tolist(), strict=True)
        counts.update(kind_of(token_id, V) for token_id, is_target in masked if is_target)
    for found in (count_tokens(masked_store, block_tokens) for block_tokens in (1, 20, 1000)):
        assert found.targets_by_kind == {kind: counts[kind] for kind in TargetKind}
        assert found.rows_without_target == 1
    assert counts[TargetKind.TEXT] and counts[TargetKind.UNIT] and not counts[TargetKind.BOS]
    words = words_of("\n".join(describe(inspect_store(masked_store))))
    assert f"targets {counts.total()} ({counts.total() / 35:.1%} of the tokens)" in words
    assert "no target in 1 rows" in words
    assert f"text 9 25.7% {counts[TargetKind.TEXT]} targets" in words


def test_memory_does_not_grow_with_the_store(write_store: Callable[..., TokenStore]) -> None:
    """Beyond the index: blocks, not the 2 MB of tokens (8 MB as numpy counts them)."""
    rows = [[[BOS, *([5] * 497), U, EOS]]] * 2000
    store = write_store(rows, block=500)
    for scan in (count_tokens, check_grammar):
        tracemalloc.start()
        scan(store, block_tokens=10_000)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000


# --- the command


def test_what_a_person_reads(
    write_store: Callable[..., TokenStore], capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(ROWS, row_capacity=20)
    assert inspect(store.prefix, "--verify") == 0
    words = words_of(capsys.readouterr().out)
    for expected in (
        "rows 3",
        "samples 8 (2.7 a row)",
        "tokens 35",
        "longest row 13 of 20",
        "fill 58.3%",
        "in use 4 text ids, 3 of 7 units",
        "text 9 25.7%",
        "unit 6 17.1%",
        "text only 2 25.0%",
        "continue and correspond 1 12.5%",
        "sample lengths: shortest 2, median 4, mean 4.4, 90 % 7, 99 % 8, longest 8",
        f"4 to 7 4 {'#' * 40}",
        f"8 to 15 1 {'#' * 10}",
        "row 0: 3 samples, 13 tokens",
        "sample 1: 6 tokens",
        "unit 2 0 1",
        "verified every byte matches its checksum, every id is in the vocabulary",
    ):
        assert expected in words
    assert not any("grammar" in line for line in words)


def test_broken_grammar_is_exit_code_2(
    write_store: Callable[..., TokenStore], capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(ROWS)
    assert inspect(store.prefix, "--grammar", "--offences", 1) == 2
    captured = capsys.readouterr()
    words = words_of(captured.out)
    for expected in (
        "grammar 2 offences in 2 samples of 1 rows",
        "unmarked_switch 1 text and units meet only at <|continue|> or <|correspond|>",
        "row 2, sample 0, token 2: unmarked_switch: bos 5 [<|unit0|>] eos bos",
        "… 1 more",
    ):
        assert expected in words
    assert "1 of 3 rows break USDM's token grammar; mend the input" in captured.err
    assert inspect(write_store(ROWS[:2], "good").prefix, "--grammar") == 0
    assert "grammar every sample keeps all 9 rules" in " ".join(capsys.readouterr().out.split())
    assert inspect(store.prefix, "--offences", -1) == 2
    assert "--offences is -1, the least is 0" in capsys.readouterr().err


def test_json(write_store: Callable[..., TokenStore], capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(ROWS)
    assert inspect(store.prefix, "--json", "--verify", "--grammar") == 2  # and still one whole object
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == 3 and record["fill"] == store.summary.fill
    assert record["identity"] == store.identity and record["verified"] is True
    kinds = {"text": 9, "unit": 6, "continue": 2, "correspond": 2, "eos": 8, "bos": 8}
    assert record["tokens_by_kind"] == kinds
    assert record["samples_by_pattern"]["unmarked"] == 1 and record["targets_by_kind"] is None
    assert record["sample_lengths"]["counts"] == [3, 4, 1]
    assert [len(sample["runs"]) for sample in record["example_row"]["samples"]] == [3, 5, 3]
    assert record["grammar"]["count_by_rule"]["empty_sample"] == 1
    assert record["grammar"]["first"][0] == {
        "rule": "unmarked_switch",
        "row": 2,
        "sample": 0,
        "position": 2,
        "token_id": U,
        "around": "bos 5 [<|unit0|>] eos bos",
    }
    assert inspect(store.prefix, "--json") == 0
    assert json.loads(capsys.readouterr().out)["grammar"] is None


def test_json_of_a_masked_store(masked_store: TokenStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(masked_store.prefix, "--json", "--verify", "--grammar") == 2
    record = json.loads(capsys.readouterr().out)
    assert sum(record["targets_by_kind"].values()) == record["loss_mask"]["targets"]
    assert "unmarked_switch" not in record["grammar"]["count_by_rule"]


def test_a_damaged_store(write_store: Callable[..., TokenStore], capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_store(ROWS[:2]).prefix
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    content[-4:-2] = np.array([6], dtype="<u2").tobytes()  # another word: a legal store, but not this one
    path.write_bytes(content)
    assert inspect(prefix, "--grammar") == 0
    capsys.readouterr()
    assert inspect(prefix, "--verify") == 2
    assert "sha256 is" in (captured := capsys.readouterr()).err and captured.out == ""
    assert inspect(f"{prefix}-typo") == 2
    assert "no token store" in capsys.readouterr().err


# --- the picture


@needs_matplotlib
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"row_capacity": 1}, "records longest_row .*, above its row_capacity of 1"),
        ({"notices": {"a": "b"}}, "notices: a is 'b', no count"),
        ({"vocabulary": {"text_size": 20, "unit_count": 7, "bos_id": 1e30, "eos_id": 2}}, "malformed"),
        ({"vocabulary": {"text_size": 20, "unit_count": 7, "bos_id": -1, "eos_id": 2}}, "malformed"),
        ({"vocabulary": {"text_size": 1 << 40, "unit_count": 7, "bos_id": 1, "eos_id": 2}}, "of int32"),
    ],
)
def test_a_summary_that_cannot_be(
    write_store: Callable[..., TokenStore],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    problem: str,
) -> None:
    store = write_store([[[1, 5, 2]]])
    path = Path(f"{store.prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert inspect(store.prefix) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_a_terminal_of_ascii(write_store: Callable[..., TokenStore]) -> None:
    store = write_store([[[1, *range(3, 20), *range(3, 20), 2]]])
    ended = subprocess.run(
        [sys.executable, "-m", "usdm_megatron.cli", "inspect", "store", store.prefix],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert b"\\u2026" in ended.stdout


def test_plot(masked_store: TokenStore, tmp_path: Path) -> None:
    """In a process of its own: no display, and nothing of pyplot's global state."""
    code = (
        "import sys; from usdm_megatron.cli import main; code = main(sys.argv[1:]);"
        "assert 'matplotlib.pyplot' not in sys.modules; sys.exit(code)"
    )
    picture = tmp_path / "store.png"
    picture.write_text("an older one")
    command = [sys.executable, "-c", code, "inspect", "store", masked_store.prefix, "--plot", str(picture)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"


@needs_matplotlib
def test_broken_grammar_is_drawn_too(write_store: Callable[..., TokenStore], tmp_path: Path) -> None:
    assert inspect(write_store(ROWS).prefix, "--grammar", "--plot", tmp_path / "p.png") == 2
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_plot_that_cannot_be_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name != "matplotlib" and find_spec(name, *rest)
    )
    assert inspect("no-store", "--plot", tmp_path / "nowhere" / "store.pdf") == 2
    errors = capsys.readouterr().err
    for expected in (
        "takes the name of a .png file",
        f"{tmp_path / 'nowhere'} is no directory",
        "pip install 'usdm_megatron[plot]'",
    ):
        assert expected in errors
