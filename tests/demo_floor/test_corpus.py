"""The demo's corpus: stage-4 format, the original's interleaving rule, a structure to be learnt."""

from __future__ import annotations

import dataclasses
import filecmp
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from usdm_megatron.demo import corpus
from usdm_megatron.demo.corpus import (
    WORDS,
    Speaker,
    Utterance,
    interleave,
    mistral_tokenize,
    pack_in_order,
    read_heldout,
    segment_bounds,
    write_demo_corpus,
)
from usdm_megatron.demo.settings import DEMO
from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind

VOCABULARY = USDM_VOCABULARY
SPLITS = ("train", "test")


def rows_of(directory: Path, split: str) -> list[list[int]]:
    from datasets import load_from_disk

    return load_from_disk(str(directory))[split]["input_ids"][:]


def samples_of(row: list[int]) -> list[list[int]]:
    starts = [i for i, token in enumerate(row) if token == VOCABULARY.bos_id]
    assert starts[0] == 0
    return [row[start:end] for start, end in pairwise([*starts, len(row)])]


def runs_of(sample: list[int]) -> list[tuple[TargetKind, list[int]]]:
    """Neighbouring ids of one kind, without bos and eos."""
    kinds = VOCABULARY.kind_of_id()
    runs: list[tuple[TargetKind, list[int]]] = []
    for token in sample[1:-1]:
        if runs and runs[-1][0] == kinds[token]:
            runs[-1][1].append(token)
        else:
            runs.append((TargetKind(kinds[token]), [token]))
    return runs


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_whole_samples(corpus_directory: Path, split: str) -> None:
    rows = rows_of(corpus_directory, split)
    assert all(len(row) <= DEMO.seq_length for row in rows)
    for row in rows:
        for sample in samples_of(row):
            assert sample[-1] == VOCABULARY.eos_id
            assert VOCABULARY.eos_id not in sample[:-1]
            assert max(sample) < VOCABULARY.pad_id


def test_train_rows_fill_every_step(corpus_directory: Path) -> None:
    assert len(rows_of(corpus_directory, "train")) == DEMO.train_iters * DEMO.global_batch_size


def test_some_samples_are_longer_than_the_window_and_all_fit_a_row(corpus_directory: Path) -> None:
    lengths = [len(sample) for row in rows_of(corpus_directory, "train") for sample in samples_of(row)]
    assert DEMO.sliding_window < max(lengths) <= DEMO.seq_length
    assert 0.01 < np.mean(np.array(lengths) > DEMO.sliding_window) < 0.5


def test_every_kind_of_target_occurs(corpus_directory: Path) -> None:
    for split in SPLITS:
        ids = np.concatenate([np.array(row) for row in rows_of(corpus_directory, split)])
        assert set(VOCABULARY.kind_of_id()[ids]) == set(TargetKind)


def test_heldout_utterances_are_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[tuple[str, ...]] = []

    def remembering(utterance: Utterance, **rest: Any) -> list[int]:
        spoken.append(utterance.words)
        return interleave(utterance, **rest)

    monkeypatch.setattr(corpus, "interleave", remembering)
    few_words = dataclasses.replace(  # 64 different utterances: chance alone would repeat them
        DEMO,
        words=4,
        short_utterance_words=(3, 3),
        long_utterance_share=0.0,
        train_iters=20,
        heldout_utterances=20,
    )
    heldout = {
        utterance.words for utterance in read_heldout(write_demo_corpus(tmp_path / "corpus", few_words))
    }
    trained = spoken[: -few_words.heldout_utterances]
    assert len(trained) > 200
    assert not heldout & set(trained)


def test_the_same_settings_write_the_same_bytes(tmp_path: Path) -> None:
    small = dataclasses.replace(DEMO, train_iters=3, heldout_utterances=20)
    first, second = (write_demo_corpus(tmp_path / name, small) for name in ("a", "b"))
    assert rows_of(first, "train") == rows_of(second, "train")
    assert filecmp.cmp(first / "heldout.jsonl", second / "heldout.jsonl", shallow=False)
    other = write_demo_corpus(tmp_path / "c", dataclasses.replace(small, seed=7))
    assert rows_of(first, "train") != rows_of(other, "train")


def test_words_are_distinct_and_sound_different() -> None:
    assert len(set(WORDS)) == len(WORDS) >= DEMO.words
    sounds = Speaker(DEMO, np.random.default_rng(0)).sounds
    assert len({unit for word in sounds.values() for unit in word}) == DEMO.words * DEMO.word_units


@pytest.fixture(scope="module")
def interleaved() -> list[tuple[Utterance, list[int], Speaker]]:
    """Utterances without noise and their samples: what units mean is then certain."""
    rng = np.random.default_rng(5)
    speaker = Speaker(dataclasses.replace(DEMO, noisy_unit_share=0.0, long_utterance_share=0.5), rng)
    tokenize = mistral_tokenize()
    return [
        (
            utterance,
            interleave(
                utterance, tokenize=tokenize, vocabulary=VOCABULARY, segment_units=DEMO.segment_units, rng=rng
            ),
            speaker,
        )
        for utterance in (speaker.utter_any() for _ in range(400))
    ]


def test_modalities_change_only_at_a_control_token(interleaved: list) -> None:
    content = (TargetKind.TEXT, TargetKind.UNIT)
    for _, sample, _ in interleaved:
        runs = runs_of(sample)
        assert runs[0][0] in content and runs[-1][0] in content
        for (kind, _), (following, _) in pairwise(runs):
            assert (kind in content) != (following in content)
        for (before, _), (control, ids), (after, _) in zip(runs, runs[1:], runs[2:], strict=False):
            if control not in content:
                assert len(ids) == 1
                assert before != after  # `<|continue|>` and `<|correspond|>` both switch the modality


def test_correspond_joins_the_same_words_in_both_modalities(interleaved: list) -> None:
    tokenize = mistral_tokenize()
    seen = set()
    for utterance, sample, speaker in interleaved:
        if utterance.unit_count >= DEMO.segment_units:
            continue  # several segments: a run may hold more than one of them
        runs = runs_of(sample)
        spoken = [VOCABULARY.first_unit_id + unit for word in utterance.units for unit in word]
        for kind, ids in runs:
            if kind == TargetKind.TEXT:
                assert ids == tokenize(" ".join(utterance.words))
            if kind == TargetKind.UNIT:
                assert ids == spoken
        for word, units in zip(utterance.words, utterance.units, strict=True):
            assert list(dict.fromkeys(units)) == [int(unit) for unit in speaker.sounds[word]]
        seen.add(tuple(kind for kind, _ in runs))
    text, unit, correspond = (TargetKind.TEXT, TargetKind.UNIT, TargetKind.CORRESPOND)
    assert seen == {(text,), (unit,), (text, correspond, unit), (unit, correspond, text)}


def test_segments_follow_the_number_of_units() -> None:
    rng = np.random.default_rng(0)
    words = tuple("w" for _ in range(60))
    utterance = Utterance(words, tuple((1, 2) for _ in words))  # 120 units
    counts = [len(segment_bounds(utterance, 50, rng)) - 1 for _ in range(200)]
    assert max(counts) == 3  # 120 // 50 + 1; two cuts at the same word make one less
    assert min(counts) >= 1
    assert segment_bounds(utterance, 121, rng) == [0, 60]
    cuts = [segment_bounds(utterance, 50, rng)[1:-1] for _ in range(500)]
    means = np.mean([cut for cut in cuts if len(cut) == 2], axis=0)
    assert np.all(np.abs(means - [20, 40]) < 3)  # words, around the even split


def test_pack_in_order_never_splits_and_never_reorders() -> None:
    samples = [[i] * length for i, length in enumerate([3, 4, 2, 8, 1, 1, 6])]
    rows = list(pack_in_order(iter(samples), 8))
    assert [token for row in rows for token in row] == [token for sample in samples for token in sample]
    assert [len(row) for row in rows] == [7, 2, 8, 8]
