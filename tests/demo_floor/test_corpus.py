"""The demo's corpus: the product's formats, words told by their sounds, unseen sentences held out."""

from __future__ import annotations

import dataclasses
import filecmp
import json
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from usdm_megatron.corpora.alignment import Utterance, align
from usdm_megatron.corpora.speech_corpora import ManifestCorpus
from usdm_megatron.data.grammar import check_grammar
from usdm_megatron.data.store_statistics import count_tokens
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.demo.corpus import DIALOGS, SPEAKERS, UTTERANCES, WORDS, Speaker, write_demo_corpus
from usdm_megatron.demo.settings import DEMO
from usdm_megatron.demo.tokenizer import mistral_sentencepiece_model
from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind

STORES = ("data_train", "data_test", "dialogs_train", "dialogs_test")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def utterances(directory: Path) -> list[Utterance]:
    corpus = ManifestCorpus([directory / UTTERANCES])
    found = [utterance for part in corpus.parts() for utterance in corpus.read(part)]
    assert all(isinstance(utterance, Utterance) for utterance in found)
    return [utterance for utterance in found if isinstance(utterance, Utterance)]


def dialog_texts(directory: Path) -> list[list[str]]:
    return [[turn["text"] for turn in dialog["turns"]] for dialog in records(directory / DIALOGS)]


def texts_of(store: TokenStore) -> Iterator[str]:
    """What the text runs of a store say."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(mistral_sentencepiece_model()))
    kinds = USDM_VOCABULARY.kind_of_id()
    for row_id in range(store.rows):
        tokens = store.row(row_id).tokens
        for is_text, run in groupby(tokens.tolist(), lambda token: kinds[token] == TargetKind.TEXT):
            if is_text:
                yield tokenizer.decode(list(run))


def test_words_are_distinct_and_share_no_sound() -> None:
    sounds = Speaker(DEMO).sounds
    assert list(sounds) == list(WORDS) and len(set(WORDS)) == len(WORDS)
    assert len({unit for word in sounds.values() for unit in word}) == len(WORDS) * DEMO.word_units


def test_alignment_gives_every_word_its_sounds(tmp_path: Path) -> None:
    clear = dataclasses.replace(DEMO, noisy_unit_share=0.0, utterances=200, dialogs=1)
    sounds = Speaker(clear).sounds
    for utterance in utterances(write_demo_corpus(tmp_path / "corpus", clear)):
        spans = align(utterance.words, len(utterance.units))
        assert [span.text for span in spans] == [word.text for word in utterance.words]
        for span in spans:
            heard = utterance.units[span.start_unit : span.end_unit].tolist()
            assert [unit for unit, _ in groupby(heard)] == sounds[span.text]


def test_words_can_be_told_from_noisy_sounds(corpus_directory: Path) -> None:
    sounds = Speaker(DEMO).sounds
    units = [unit for utterance in utterances(corpus_directory) for unit in utterance.units.tolist()]
    words = [word.text for utterance in utterances(corpus_directory) for word in utterance.words]
    word_of = {unit: word for word, of_word in sounds.items() for unit in of_word}
    assert set(units) <= set(word_of) and set(words) == set(WORDS)
    spoken = sum(
        word_of[unit] == span.text
        for utterance in utterances(corpus_directory)
        for span in align(utterance.words, len(utterance.units))
        for unit in utterance.units[span.start_unit : span.end_unit].tolist()
    )
    assert 1 - DEMO.noisy_unit_share - 0.01 < spoken / len(units) < 1


def test_the_reply_follows_from_the_users_words_alone(corpus_directory: Path) -> None:
    """Whoever learns word for word from some dialogs knows the replies in all others."""
    dialogs = dialog_texts(corpus_directory)
    answers: dict[str, str] = {}
    for turns in dialogs[:100]:
        for text, reply in pairwise(turns):
            answers |= dict(zip(text.split(), reply.split(), strict=True))
    assert set(answers) == set(answers.values()) == set(WORDS)
    for turns in dialogs[100:]:
        for text, reply in pairwise(turns):
            assert reply.split() == [answers[word] for word in text.split()]


def test_speakers_take_turns(corpus_directory: Path) -> None:
    for dialog in records(corpus_directory / DIALOGS):
        speakers = [turn["speaker"] for turn in dialog["turns"]]
        assert DEMO.dialog_turns[0] <= len(speakers) <= DEMO.dialog_turns[1]
        assert speakers == [SPEAKERS[number % 2] for number in range(len(speakers))]


def test_no_sentence_is_said_twice(tmp_path: Path, corpus_directory: Path) -> None:
    crowded = dataclasses.replace(  # of 400 sentences of two words: chance alone would repeat them
        DEMO,
        utterances=150,
        short_utterance_words=(2, 2),
        long_utterance_share=0.0,
        dialogs=20,
        dialog_words=(2, 2),
    )
    for directory in (corpus_directory, write_demo_corpus(tmp_path / "corpus", crowded)):
        said = [" ".join(word.text for word in utterance.words) for utterance in utterances(directory)]
        said += [text for turns in dialog_texts(directory) for text in turns]
        assert len(set(said)) == len(said) > 180


def test_too_few_words_for_so_many_sentences_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no new one of 1 to 1 words"):
        write_demo_corpus(tmp_path / "corpus", dataclasses.replace(DEMO, short_utterance_words=(1, 1)))


def test_the_same_settings_write_the_same_bytes(tmp_path: Path) -> None:
    small = dataclasses.replace(DEMO, utterances=50, dialogs=20)
    first, second = (write_demo_corpus(tmp_path / name, small) for name in ("a", "b"))
    other = write_demo_corpus(tmp_path / "c", dataclasses.replace(small, seed=7))
    for name in (UTTERANCES, DIALOGS):
        assert filecmp.cmp(first / name, second / name, shallow=False)
        assert not filecmp.cmp(first / name, other / name, shallow=False)


def test_train_rows_fill_every_step_and_little_is_left_over(stores_directory: Path) -> None:
    rows = TokenStore.open(stores_directory / "data_train").rows
    assert DEMO.train_rows <= rows <= 1.02 * DEMO.train_rows
    dialogs = TokenStore.open(stores_directory / "dialogs_train").rows
    read = [tuning.train_iters * tuning.global_batch_size for tuning in (DEMO.full_tuning, DEMO.lora_tuning)]
    assert max(read) <= dialogs <= 1.06 * max(read)


@pytest.mark.parametrize("name", STORES)
def test_preprocessing_rejects_nothing_and_keeps_the_grammar(stores_directory: Path, name: str) -> None:
    store = TokenStore.open(stores_directory / name)
    report = json.loads((stores_directory / f"{name.partition('_')[0]}_report.json").read_text())
    assert report["rejected"]["total"] == 0
    assert store.longest_row <= DEMO.seq_length
    assert check_grammar(store).offences == 0


@pytest.mark.parametrize("name", STORES[:2])
def test_every_kind_of_target_occurs_but_continue(stores_directory: Path, name: str) -> None:
    """Utterances are shorter than 10 s, so they are one segment each."""
    counted = count_tokens(TokenStore.open(stores_directory / name)).tokens_by_kind
    assert {kind for kind, tokens in counted.items() if tokens} == set(TargetKind) - {TargetKind.CONTINUE}


def test_some_samples_are_longer_than_the_window(stores_directory: Path) -> None:
    lengths = TokenStore.open(stores_directory / "data_train").sample_lengths()
    assert 0.01 < np.mean(lengths > DEMO.sliding_window) < 0.5


def test_heldout_sentences_are_never_trained_on(stores_directory: Path) -> None:
    train, test = (set(texts_of(TokenStore.open(stores_directory / name))) for name in STORES[:2])
    assert len(test) > 200 and not train & test


def test_heldout_dialogs_are_never_trained_on(stores_directory: Path) -> None:
    """The text of an exchange is one run: the user's words, the header, the agent's."""
    utterances_said, _, train, test = (
        set(texts_of(TokenStore.open(stores_directory / name))) for name in STORES
    )
    exchanges = {text for text in test if "### Agent" in text}
    users = {text.partition("\n")[0] for text in exchanges}
    assert len(exchanges) > 100
    assert not exchanges & train and not users & utterances_said
    assert not users & {text.partition("\n")[0] for text in train}
