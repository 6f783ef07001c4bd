"""What the fine-tuning demos report: new sentences, word errors, and the losses of what was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.demo_floor.test_corpus import dialog_texts, utterances
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.demo.held_out import EXPORTED, HELD_OUT, UNITS, TrainedText, trained_text
from usdm_megatron.demo.held_out import write_held_out_units as write_units
from usdm_megatron.demo.report import read_losses
from usdm_megatron.demo.settings import DEMO
from usdm_megatron.demo.sft_report import ExportedLoss, Listening, masked_loss, print_report
from usdm_megatron.reply.error_rate import ErrorCount
from usdm_megatron.tokenizer.files import extend_tokenizer
from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind

LETTERS = TrainedText(frozenset({"a b c", "d e", "f"}))


@pytest.fixture(scope="module")
def pretrained(
    stores_directory: Path, model_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the pre-training demo leaves, as far as the tokens go: stores, and the exported tokenizer."""
    directory = tmp_path_factory.mktemp("pretrained")
    for path in stores_directory.iterdir():
        (directory / path.name).symlink_to(path)
    extend_tokenizer(model_directory, directory / EXPORTED, USDM_VOCABULARY, DEMO.max_positions)
    config = json.loads((model_directory / "config.json").read_text())
    config["vocab_size"] = USDM_VOCABULARY.size
    (directory / EXPORTED / "config.json").write_text(json.dumps(config))
    return directory


def test_what_was_trained_on_is_the_corpus_without_what_is_held_out(
    pretrained: Path, corpus_directory: Path
) -> None:
    trained = trained_text(pretrained)
    spoken = {" ".join(word.text for word in utterance.words) for utterance in utterances(corpus_directory)}
    in_dialogs = {text for dialog in dialog_texts(corpus_directory) for text in dialog}
    shares = [sum(map(trained.has, texts)) / len(texts) for texts in (spoken, in_dialogs)]
    assert 0.94 < shares[1] < 0.97  # 5 % are held out
    assert 0.0 < shares[0] < shares[1]  # an utterance may be drawn as units alone
    said = spoken | in_dialogs
    met = [sentence for sentence in said if trained.has(sentence)]
    assert trained.has_within(met) == [True] * len(met)
    lines_of_the_template = trained.lines - said
    assert len(lines_of_the_template) < 5 and "### User" in lines_of_the_template


def test_held_out_users_say_what_was_never_said_in_training(pretrained: Path, tmp_path: Path) -> None:
    write_units(pretrained, tmp_path)
    assert (tmp_path / UNITS).read_text().split() != []
    replies = [{"reference_transcript": text, "transcript": text} for text in held_out_sentences(pretrained)]
    listening = Listening.of(replies, trained_text(pretrained))
    assert (listening.said_in_training, listening.problems()) == (0, [])
    assert 0 < listening.new_dialogs < listening.dialogs == TokenStore.open(pretrained / HELD_OUT).rows


def held_out_sentences(pretrained: Path) -> list[str]:
    """The line behind the user's units, by the mask."""
    import sentencepiece

    from usdm_megatron.demo.tokenizer import mistral_sentencepiece_model

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(mistral_sentencepiece_model()))
    store, found = TokenStore.open(pretrained / HELD_OUT), []
    for row_id in range(store.rows):
        row = store.row(row_id)
        assert row.loss_mask is not None
        first = int(row.loss_mask.argmax())
        found.append(tokenizer.decode(row.tokens[first : first + 8].tolist()).partition("\n")[0])
    return found


def test_the_units_are_those_of_a_dialog_of_the_corpus(
    pretrained: Path, corpus_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_units(pretrained, tmp_path)
    units = [int(word) for word in (tmp_path / UNITS).read_text().split()]
    lines = (corpus_directory / "dialogs.jsonl").read_text().splitlines()
    turns = [json.loads(line)["turns"] for line in lines]
    (user, agent), *_ = [
        (one, other)
        for dialog in turns
        for one, other in zip(dialog, dialog[1:], strict=False)
        if one["units"] == units
    ]
    printed = capsys.readouterr().out
    assert f"they say     {user['text']}\n" in printed and f"right reply  {agent['text']}\n" in printed


def reply(said: str, heard: str) -> dict[str, Any]:
    return {"reference_transcript": said, "transcript": heard}


def test_listening_counts_words_and_what_is_new() -> None:
    replies = [reply("a b", "a b"), reply("c a b", "c x b"), reply("e d", "e d d")]
    listening = Listening.of(replies, LETTERS)
    assert (listening.dialogs, listening.said_in_training, listening.new_dialogs) == (3, 0, 2)
    assert (listening.errors, listening.new_errors) == (ErrorCount(2, 7), ErrorCount(2, 5))
    (problem,) = listening.problems()
    assert "28.6%" in problem and "at most 10%" in problem
    (known,) = Listening.of([reply("d e", "d e")], LETTERS).problems()
    assert "1 held-out sentences were said in training" in known
    assert "no dialog was held out" in Listening.of([], LETTERS).problems()[0]


def test_an_export_that_computes_something_else_is_a_problem() -> None:
    assert not ExportedLoss("m", "transformers", 0.5, 0.50001).problems()
    (problem,) = ExportedLoss("m", "peft", 0.5, 0.501).problems()
    assert "0.500000 in peft" in problem and "the run's was 0.501000" in problem
    assert ExportedLoss("m", "peft", float("nan"), 0.501).problems()


def test_the_masked_loss_is_that_of_transformers_labels(stores_directory: Path) -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=USDM_VOCABULARY.size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=1.0,
    )
    model, store = MistralForCausalLM(config), TokenStore.open(stores_directory / HELD_OUT)
    losses, counts = [], []
    for row_id in range(store.rows):
        row = store.row(row_id)
        assert row.loss_mask is not None
        ids = torch.from_numpy(row.tokens.astype("int64"))[None]
        labels = ids.masked_fill(torch.tensor(row.loss_mask)[None] == 0, -100)
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
        counts.append(int(row.loss_mask.sum()))
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert masked_loss(model, store) == pytest.approx(expected, rel=1e-5)


def test_the_report_prints_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {f"loss_{kind.label}": None for kind in TargetKind} | {"loss_text": 0.75, "loss_unit": 0.25}
    accuracy = {"accuracy": 0.875, "accuracy_text": 0.75, "accuracy_unit": 0.5, "accuracy_bos": None}
    lines = [
        {"kind": kind, "step": 3, "loss": 0.5, **kinds, **(accuracy if kind == "eval" else {})}
        for kind in ("train", "eval")
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "model").mkdir()
    listening = Listening.of([reply("c a b", "c x b"), reply("a b", "a b")], LETTERS)
    replies = {"text_word_error_rate": 0.125, "unit_error_rate": 0.375}
    exported = [ExportedLoss("M", "transformers", 0.500002, 0.5), ExportedLoss("A", "peft", 0.500003, 0.5)]
    print_report(tmp_path, read_losses(path), listening, replies, exported)
    printed = capsys.readouterr().out
    assert "87.5%, text 75.0%, unit 50.0%\n" in printed
    for expected in ("0.750", "20.0% (of the latter 33.3%", "12.5%", "37.5%", "0.500002 (M)", "0.500003 (A)"):
        assert expected in printed
    assert str(tmp_path / "model") in printed
    assert "adapter" not in printed and "bos" not in printed and "continue" not in printed
