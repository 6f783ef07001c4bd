"""From corpora to samples: they read back as their utterances, whoever makes them and in whatever order."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.corpora_floor.speech import Record, make_records, write_jsonl, write_tree
from usdm_megatron.corpora import speech_corpora, speech_text
from usdm_megatron.corpora.alignment import Word, align
from usdm_megatron.corpora.interleave import interleave, sample_generator
from usdm_megatron.corpora.speech_corpora import ManifestCorpus
from usdm_megatron.corpora.speech_text import SpeechTextSource
from usdm_megatron.corpora.textgrid_corpus import TextGridCorpus
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.errors import ConfigError
from usdm_megatron.preprocess.samples import Rejection, SampleBlock, utterance_hash
from usdm_megatron.tokenizer.text_encoder import TextEncoder
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

RECORDS = make_records(30)
Sample = tuple[int, int, tuple[int, ...]]  # utterance hash, epoch, ids


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain tokenizer of Mistral-7B-v0.1."""
    return write_mistral_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def source_of(corpus: Any, tokenizer_dir: Path, **options: Any) -> SpeechTextSource:
    return SpeechTextSource(
        corpus, TextEncoder(tokenizer_dir), **{"vocabulary": USDM_VOCABULARY, "seed": 5, **options}
    )


def samples_of(blocks: list[SampleBlock]) -> list[Sample]:
    found: list[Sample] = []
    for block in blocks:
        assert (block.tokens.dtype, block.lengths.dtype) == (np.int32, np.int64)
        assert (block.utterances.dtype, block.groups.dtype) == (np.uint64, np.int32)
        assert int(block.lengths.sum()) == len(block.tokens) and block.loss_mask is None
        cuts = np.split(block.tokens, np.cumsum(block.lengths))[:-1]
        for utterance, epoch, ids in zip(block.utterances, block.groups, cuts, strict=True):
            found.append((int(utterance), int(epoch), tuple(ids.tolist())))
    return found


def make_all(source: SpeechTextSource) -> list[Sample]:
    return samples_of([source.make(part) for part in source.parts()])


def rejections_of(source: SpeechTextSource) -> list[Rejection]:
    return [rejection for part in source.parts() for rejection in source.make(part).rejections]


# ── what a sample is ──


def test_every_draw_is_the_interleaving_of_its_utterance(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Against `align` and `interleave` one by one, with the tokenizer itself."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    made = make_all(
        source_of(ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", RECORDS)]), tokenizer_dir, epochs=3)
    )
    expected = []
    for record in RECORDS:
        words = [Word(word["text"], word["start"], word["end"]) for word in record["words"]]
        spans = align(words, len(record["units"]), duration_s=record["duration"])
        unit_ids = np.array(record["units"]) + 32_002
        for epoch in range(3):
            rng = sample_generator(5, epoch, record["id"])
            ids = interleave(spans, unit_ids, encode, USDM_VOCABULARY, rng)
            expected.append((utterance_hash(record["id"]), epoch, tuple(ids.tolist())))
    assert made == expected
    assert len({ids for _, _, ids in made}) > 2 * len(RECORDS)  # draws differ


def test_samples_read_back_as_words_and_units(tmp_path: Path, tokenizer_dir: Path) -> None:
    """By the tokenizer's own decoder; which runs repeat a segment is `test_interleave`'s."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    source = source_of(ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", RECORDS)]), tokenizer_dir, epochs=4)
    kinds: Counter[str] = Counter()
    for utterance, _, ids in make_all(source):
        record = next(one for one in RECORDS if utterance_hash(one["id"]) == utterance)
        transcript = [word["text"] for word in record["words"]]
        assert (ids[0], ids[-1]) == (1, 2)
        texts: list[str] = []
        units: list[int] = []
        runs: list[list[int]] = [[]]
        for token_id in ids[1:-1]:
            if token_id in (32_000, 32_001) or (runs[-1] and (token_id < 32_000) != (runs[-1][-1] < 32_000)):
                runs.append([])
            if token_id not in (32_000, 32_001):
                runs[-1].append(token_id)
        for run in filter(None, runs):
            if run[0] < 32_000:
                texts += tokenizer.decode(run).split()
            else:
                units += [token_id - 32_002 for token_id in run]
        if not units:
            assert texts == transcript
        if not texts:
            assert units == record["units"]
        kinds["text" if not units else "units" if not texts else "both"] += 1
        # In order, and nothing invented: each is a subsequence of what was said.
        for found, said in ((texts, transcript), (units, record["units"])):
            remaining = iter(said)
            assert all(item in remaining for item in found)
        assert len(ids) <= 2 + 2 * len(record["units"]) + 20 * len(transcript)
    assert set(kinds) == {"text", "units", "both"}


# ── nothing depends on who makes it ──


@pytest.mark.parametrize("part_bytes", [20_000, 1])
def test_parts_and_order_change_nothing(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", RECORDS)
    whole = make_all(source_of(ManifestCorpus([path]), tokenizer_dir, epochs=3))
    monkeypatch.setattr(speech_corpora, "PART_BYTES", part_bytes)
    monkeypatch.setattr(speech_text, "EPOCHS_PER_PART", 2)
    source: SpeechTextSource = pickle.loads(
        pickle.dumps(source_of(ManifestCorpus([path]), tokenizer_dir, epochs=3))
    )
    parts = pickle.loads(pickle.dumps(source.parts()))
    assert len(parts) > 4
    backwards = samples_of([source.make(part) for part in reversed(parts)])
    assert sorted(backwards) == sorted(whole)
    shuffled = write_jsonl(tmp_path / "s.jsonl", RECORDS[::-1])
    assert sorted(make_all(source_of(ManifestCorpus([shuffled]), tokenizer_dir, epochs=3))) == sorted(whole)


def test_more_epochs_begin_with_the_same_draws(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", RECORDS)])
    few, many = (set(make_all(source_of(corpus, tokenizer_dir, epochs=epochs))) for epochs in (2, 11))
    assert few == {sample for sample in many if sample[1] < 2}
    assert Counter(epoch for _, epoch, _ in many) == dict.fromkeys(range(11), len(RECORDS))
    other_seed = set(make_all(source_of(corpus, tokenizer_dir, epochs=2, seed=6)))
    assert len(few & other_seed) < len(few) / 2  # one segment is one of four samples


@pytest.mark.parametrize("style", ["long_textgrid", "short_textgrid"])
def test_a_tree_and_a_manifest_give_the_same_samples(tmp_path: Path, tokenizer_dir: Path, style: str) -> None:
    manifest = ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", RECORDS[:10])])
    tree = TextGridCorpus(*write_tree(tmp_path / "tree", RECORDS[:10], style))
    of_manifest, of_tree = (make_all(source_of(corpus, tokenizer_dir)) for corpus in (manifest, tree))
    assert sorted(of_tree) == sorted(of_manifest)
    assert len(source_of(tree, tokenizer_dir).files()) == 20


# ── rejections ──


def changed(record: Record, **changes: Any) -> Record:
    return {**record, **changes}


def test_rejections_by_reason(tmp_path: Path, tokenizer_dir: Path) -> None:
    good, other = RECORDS[0], RECORDS[1]
    injected = [*other["words"][:-1], {**other["words"][-1], "text": "<|unit5|>"}]
    records = [
        good,
        changed(other, id="few", words=other["words"][:2]),
        changed(other, id="backwards", words=other["words"][::-1]),
        changed(other, id="no units", units=[]),
        changed(other, id="foreign unit", units=[10_000, *other["units"][1:]]),
        changed(other, id="injected", words=injected),
        changed(other, id="halved", units=other["units"][::2]),
        changed(other, id="no words", words=None),
    ]
    source = source_of(ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", records)]), tokenizer_dir, epochs=20)
    assert {(one.where, one.reason) for one in rejections_of(source)} == {
        ("few", "fewer_than_3_words"),
        ("backwards", "times_not_increasing"),
        ("no units", "units_missing"),
        ("foreign unit", "unit_out_of_range"),
        ("injected", "special_token_in_text"),
        ("halved", "units_do_not_fit_duration"),
        ("no words", "malformed_words"),
    }
    assert len(rejections_of(source)) == 7  # once each, though three parts draw 20 epochs
    assert "<|unit5|>" in next(one.detail for one in rejections_of(source) if one.where == "injected")
    assert {utterance for utterance, _, _ in make_all(source)} == {utterance_hash(good["id"])}


def test_over_long_samples_are_counted(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", RECORDS)])
    whole = make_all(source_of(corpus, tokenizer_dir, epochs=2))
    limit = int(np.median([len(ids) for _, _, ids in whole]))
    source = source_of(corpus, tokenizer_dir, epochs=2, seq_length=limit)
    assert make_all(source) == [sample for sample in whole if len(sample[2]) <= limit]
    rejected = rejections_of(source)
    assert {one.reason for one in rejected} == {"over_long"}
    assert len(rejected) == sum(len(ids) > limit for _, _, ids in whole) > 5
    assert rejected[0].where.endswith(("(epoch 0)", "(epoch 1)"))


def test_a_part_of_nothing_but_rejections(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [changed(RECORDS[0], words=[])])
    source = source_of(ManifestCorpus([path]), tokenizer_dir)
    assert make_all(source) == []
    assert [one.reason for one in rejections_of(source)] == ["fewer_than_3_words"]


def test_every_option_out_of_range_at_once(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = ManifestCorpus([write_jsonl(tmp_path / "m.jsonl", RECORDS)])
    wrong = {"epochs": 0, "seed": -1, "seq_length": 0, "units_per_second": 0.0}
    with pytest.raises(ConfigError) as caught:
        source_of(corpus, tokenizer_dir, vocabulary=Vocabulary(unit_count=0), **wrong)
    assert [problem.split(" ")[0].rstrip(":") for problem in caught.value.problems] == [
        "--epochs",
        "--seed",
        "--seq-length",
        "--units-per-second",
        "--tokenizer",
    ]
