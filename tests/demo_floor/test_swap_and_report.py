"""The swap figure and the report, on models and metrics whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.demo.corpus import Speaker
from usdm_megatron.demo.report import print_report, read_losses
from usdm_megatron.demo.settings import DEMO
from usdm_megatron.demo.swap import SwapFigure, read_pairs, swap_figure, swap_rows
from usdm_megatron.demo.tokenizer import mistral_sentencepiece_model
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind

VOCABULARY = USDM_VOCABULARY


def split_row(row: np.ndarray) -> tuple[list[int], list[int]]:
    ids = row.tolist()
    at = ids.index(VOCABULARY.correspond_id)
    assert (ids[0], ids[-1]) == (VOCABULARY.bos_id, VOCABULARY.eos_id)
    return ids[1:at], ids[at + 1 : -1]


def test_rows_differ_in_the_units_only_and_none_keeps_its_own(stores_directory: Path) -> None:
    pairs = read_pairs(TokenStore.open(stores_directory / "data_test"), DEMO.swap_utterances)
    rows = swap_rows(pairs, VOCABULARY)
    assert len(rows.own) == len(rows.other) == DEMO.swap_utterances
    kinds = VOCABULARY.kind_of_id()
    for own, other in zip(rows.own, rows.other, strict=True):
        (own_units, own_text), (other_units, other_text) = split_row(own), split_row(other)
        assert own_text == other_text
        assert own_units != other_units
        assert {kinds[unit] for unit in own_units + other_units} == {TargetKind.UNIT}
        assert {kinds[token] for token in own_text} == {TargetKind.TEXT}
    assert len({tuple(split_row(row)[0]) for row in rows.other}) == len(rows.other)  # each other's units once
    assert len({tuple(split_row(row)[1]) for row in rows.own}) == len(rows.own)


def test_own_units_say_the_text_and_others_do_not(stores_directory: Path) -> None:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(mistral_sentencepiece_model()))
    pairs = read_pairs(TokenStore.open(stores_directory / "data_test"), DEMO.swap_utterances)
    word_of = {unit: word for word, units in Speaker(DEMO).sounds.items() for unit in units}

    def share_said(row: np.ndarray) -> float:
        units, text = split_row(row)
        words = tokenizer.decode(text).split()
        return float(np.mean([word_of[unit - VOCABULARY.first_unit_id] in words for unit in units]))

    rows = swap_rows(pairs, VOCABULARY)
    assert np.mean([share_said(row) for row in rows.own]) > 0.9
    assert np.mean([share_said(row) for row in rows.other]) < 0.5


def test_pairs_are_samples_of_one_segment_in_both_modalities(tmp_path: Path) -> None:
    vocabulary = tiny.VOCABULARY
    bos, eos, correspond, cont = (
        vocabulary.bos_id,
        vocabulary.eos_id,
        vocabulary.correspond_id,
        vocabulary.continue_id,
    )
    first, second = vocabulary.first_unit_id, vocabulary.first_unit_id + 1
    rows = [
        [[bos, 10, 11, eos], [bos, first, first, correspond, 10, 11, eos]],
        [[bos, second, eos], [bos, 12, 13, correspond, second, eos], [bos, 10, cont, first, eos]],
        [[bos, 10, 11, correspond, first, second, eos], [bos, 10, cont, first, correspond, 14, eos]],  # again
        [[bos, second, correspond, 15, eos]],
    ]
    store = TokenStore.open(tiny.write_store(tmp_path / "store", rows))
    pairs = read_pairs(store, most=10)
    assert [(pair.units.tolist(), pair.text.tolist()) for pair in pairs] == [
        ([first, first], [10, 11]),
        ([second], [12, 13]),
        ([second], [15]),
    ]
    assert len(read_pairs(store, most=2)) == 2
    too_few = tiny.write_store(tmp_path / "few", rows[:1])
    with pytest.raises(DataError, match="holds 1 samples of units and their text"):
        read_pairs(TokenStore.open(too_few), most=10)


def test_a_model_that_has_learnt_nothing_has_no_figure(stores_directory: Path, tmp_path: Path) -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    figure = swap_figure(tmp_path, stores_directory / "data_test")
    assert abs(figure.reduction) < 0.01
    assert figure.own_loss == pytest.approx(10.65, abs=0.1)  # ln 42,003


def test_reduction_is_the_share_of_the_swapped_loss() -> None:
    assert SwapFigure(own_loss=2.0, other_loss=4.0).reduction == 0.5
    assert SwapFigure(own_loss=4.0, other_loss=4.0).reduction == 0.0


def metrics_line(kind: str, step: int, loss: float, **fields: Any) -> str:
    by_kind = {f"loss_{kind.label}": loss for kind in TargetKind}
    return json.dumps({"kind": kind, "step": step, "loss": loss, **by_kind, **fields}) + "\n"


def test_the_report_reads_first_last_and_heldout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        json.dumps({"kind": "event", "step": 0, "what": "start"})
        + "\n"
        + metrics_line("train", 1, 10.5, loss_bos=None)
        + metrics_line("train", 2, 9.5)
        + metrics_line("eval", 2, 9.25)
        + metrics_line("train", 3, 8.5, loss_bos=None)
        + metrics_line("eval", 3, 8.25, loss_continue=None)
    )
    losses = read_losses(path)
    assert (losses.first_step, losses.last_step) == (1, 3)
    assert (losses.first["loss"], losses.last["loss_unit"], losses.heldout["loss_text"]) == (10.5, 8.5, 8.25)
    assert losses.first["loss_bos"] is None
    print_report(tmp_path, losses, SwapFigure(2.0, 4.0), {"max_abs_difference": 1.25e-6})
    printed = capsys.readouterr().out
    for expected in ("10.500", "8.250", "50 %", "1.25e-06", str(tmp_path / "exported")):
        assert expected in printed.replace("\n", "")


@pytest.mark.parametrize("content", [None, "", metrics_line("train", 1, 2.0)])
def test_an_unfinished_run_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        read_losses(path)
