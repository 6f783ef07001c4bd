"""`pretrain` with and without `--lora`, from a Hugging Face model to exports of any step, by commands alone.

What is exported is loaded by peft and transformers, and must have the loss that the run logged for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.convert_floor.adapter_checkpoints import all_tensors, peft_model
from tests.ranks import run_ranks
from tests.training import reference
from usdm_megatron.checkpoint.facts import read_facts
from usdm_megatron.checkpoint.resolve import read_best
from usdm_megatron.cli import main
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.model.lora.names import TOKEN_ROWS
from usdm_megatron.vocab import Vocabulary

SEQ_LENGTH, ROWS, GLOBAL_BATCH, STEPS, SOME_STEP = 48, 12, 4, 6, 4  # steps of two epochs
LORA = ("--lora", "--lora-r", "3", "--lora-target-modules", "q_proj", "v_proj", "down_proj")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
WARNING = "--train-new-embeddings trains them"


@dataclass(frozen=True)
class Extended:
    """A converted model with fresh rows for speech, its export, and rows to train and to evaluate on."""

    checkpoint: Path
    hf: Path
    train: Path
    valid: Path
    valid_rows: list[list[list[int]]]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extended:
    work = tmp_path_factory.mktemp("extended")
    source = tiny.write_hf_model(work / "mistral", vocab_size=32_000, hidden_size=16, num_hidden_layers=2)
    write_mistral_tokenizer(source)
    checkpoint, hf = work / "checkpoint", work / "hf"
    convert("import", "--hf-path", source, "--save", checkpoint, "--extend-vocab", "units=100")
    convert("export", "--load", checkpoint, "--hf-path", hf)
    vocabulary = read_facts(checkpoint / "release").vocabulary
    rows = half_speech(tiny.random_rows(ROWS, SEQ_LENGTH, vocabulary=vocabulary), vocabulary)
    text = Vocabulary(text_size=200, unit_count=0)
    valid = half_speech(tiny.random_rows(5, SEQ_LENGTH, seed=1, vocabulary=text), vocabulary)
    return Extended(
        checkpoint,
        hf,
        tiny.write_store(work / "train", rows, vocabulary),
        tiny.write_store(work / "valid", valid, vocabulary),
        valid,
    )


def half_speech(rows: list[list[list[int]]], vocabulary: Vocabulary) -> list[list[list[int]]]:
    """Every second token a unit."""

    def unit(token: int) -> int:
        return vocabulary.first_unit_id + token % vocabulary.unit_count

    return [
        [[unit(token) if at % 2 else token for at, token in enumerate(sample)] for sample in row]
        for row in rows
    ]


def convert(*words: Any) -> None:
    assert main(["convert", *map(str, words)]) == 0


@dataclass(frozen=True)
class Run:
    directory: Path
    printed: str  # by the first start
    eval_losses: dict[int | str | None, float]  # by `--ckpt-step`; None: without it


def command(environment: Any, store: Any, words: Sequence[str]) -> str:
    """A command on this rank, as torchrun starts it; what it printed."""
    from usdm_megatron.runtime import process_groups

    opened = process_groups.open_process_groups
    process_groups.open_process_groups = lambda *args, **options: opened(*args, **{**options, "store": store})
    where = {"RANK": environment.rank, "WORLD_SIZE": environment.world_size, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(words) == 0
    return printed.getvalue()


def pretrain(extended: Extended, directory: Path, ranks: int, *flags: str) -> Run:
    """One epoch, and the same words again for a second one; the best step is not the last."""
    printed = []
    for epochs in (1, 2):
        words = [
            "pretrain", "--load", directory, "--save", directory,
            "--pretrained-checkpoint", extended.checkpoint,
            "--train-data-path", extended.train, "--valid-data-path", extended.valid,
            "--seq-length", SEQ_LENGTH, "--global-batch-size", GLOBAL_BATCH, "--num-train-epochs", epochs,
            "--lr", 0.6, "--lr-decay-style", "constant", "--shuffle",
            "--eval-interval", 1, "--save-interval", 1, "--keep-best",
        ]  # fmt: skip
        printed += run_ranks(ranks, command, [*map(str, words), *flags])[:1]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    resumed = [line["step"] for line in lines if line.get("what") == "resume"]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "eval"}
    best = read_best(directory)
    assert resumed == [STEPS // 2] and list(losses) == list(range(1, STEPS + 1))
    assert best == min(losses, key=losses.__getitem__) and best not in (SOME_STEP, STEPS)
    return Run(
        directory, printed[0], {SOME_STEP: losses[SOME_STEP], "best": losses[best], None: losses[STEPS]}
    )


@dataclass(frozen=True)
class Kind:
    """What trains, and on how many ranks."""

    ranks: int
    flags: tuple[str, ...]
    adapter: bool = True
    new_rows: bool = True


KINDS = {
    "adapter and new rows": Kind(2, (*LORA, *TP2)),
    "adapter": Kind(1, (*LORA, "--no-train-new-embeddings"), new_rows=False),
    "all weights": Kind(1, (), adapter=False),
}


@pytest.mark.parametrize("name", KINDS)
def test_from_a_hugging_face_model_to_exports_of_any_step(
    name: str, extended: Extended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By transformers the whole model, by peft the adapter over the base's own export."""
    kind = KINDS[name]
    run = pretrain(extended, tmp_path / "run", kind.ranks, *kind.flags)
    assert (WARNING in run.printed) == (kind.adapter and not kind.new_rows)
    for step, expected in run.eval_losses.items():
        chosen = ("--load", run.directory, *(() if step is None else ("--ckpt-step", step)))
        whole, adapter = tmp_path / f"whole {step}", tmp_path / f"adapter {step}"
        convert("export", *chosen, "--hf-path", whole, *(["--merge-lora"] if kind.adapter else []))
        assert loss_of(reference.load_model(whole), extended) == pytest.approx(expected, rel=1e-5)
        if kind.adapter:
            convert("export", *chosen, "--hf-path", adapter, "--adapter-only")
            assert loss_of(peft_model(extended.hf, adapter), extended) == pytest.approx(expected, rel=1e-5)
            assert any(TOKEN_ROWS in key for key in all_tensors(adapter)) == kind.new_rows
    capsys.readouterr()
    assert main(["inspect", "checkpoint", str(run.directory)]) == 0
    check_inspection(capsys.readouterr().out, kind, extended)


def loss_of(model: Any, extended: Extended) -> float:
    with torch.no_grad():
        parts = [reference.row_loss(model, row, train_boundaries=False) for row in extended.valid_rows]
    return sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)


def check_inspection(printed: str, kind: Kind, extended: Extended) -> None:
    """`inspect checkpoint` says how an adapter adapts, and what."""
    base = extended.checkpoint / "release"
    facts = (
        "LoRA: r 3, alpha 64, dropout 0.1, on q_proj v_proj down_proj\n",
        f"speech rows  {'trained too' if kind.new_rows else 'of the base'}\n",
        f"base         {base}\n",
        f"integrity.json has sha256 {hashlib.sha256((base / 'integrity.json').read_bytes()).hexdigest()}\n",
    )
    assert [fact in printed for fact in facts] == [kind.adapter] * len(facts), printed
    assert f"steps        {' '.join(map(str, range(1, STEPS + 1)))}\n" in printed
