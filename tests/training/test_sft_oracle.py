"""Twenty fine-tuning steps equal plain PyTorch on transformers' Mistral at every layout (fp32).

The reference (`reference.fine_tune`) reads the dialogs themselves, pads them as the original does and takes
transformers' own loss of their labels. Our side is the product's path: `ids|labels` lines, preprocess, sft.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs, reference
from tests.training.dialogs import Dialog, random_dialogs, write_lines, write_rows
from tests.training.jobs import Layout
from tests.training.test_model_parity import hf_tensors
from tests.training.test_oracle import record, relative_update_error, train_lines
from usdm_megatron.data.order import RowOrder
from usdm_megatron.data.token_store import TokenStore

ROWS, EPOCHS, GLOBAL_BATCH, MICRO_BATCH, SEQ_LENGTH, LR = 40, 2, 4, 2, 64, 3e-3
STEPS = EPOCHS * ROWS // GLOBAL_BATCH
LATE = (("overlap_grad_reduce", True), ("overlap_param_gather", True))  # evaluation needs gathered weights
LAYOUTS = [
    Layout(),
    Layout(2),
    Layout(1, 2),
    Layout(1, 1, 2),
    Layout(2, 2, sp=True),
    Layout(1, 2, vpp=3),
    Layout(1, 1, 2, extra=LATE),
]
DIALOGS = random_dialogs(ROWS, seed=1)
TEST_DIALOGS = random_dialogs(5, seed=2)


class Stores(NamedTuple):
    train: Path
    test: Path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    from usdm_megatron.preprocess.parts_plan import MergeOptions
    from usdm_megatron.preprocess.sft_lines import SftLinesSource
    from usdm_megatron.preprocess.stores import SampleOptions, StoreOptions, write_samples

    directory = tmp_path_factory.mktemp("sft")
    found = []
    for name, dialogs in (("train", DIALOGS), ("test", TEST_DIALOGS)):
        source = SftLinesSource(
            [write_lines(directory / f"{name}.txt", dialogs)], tiny.VOCABULARY, SEQ_LENGTH
        )
        write_samples(
            "sft",
            {"": source},
            str(directory / name),
            StoreOptions(seq_length=SEQ_LENGTH, vocabulary=tiny.VOCABULARY),
            SampleOptions(MergeOptions(packing="none")),
        )
        found.append(directory / name)
    return Stores(*found)


def batches_of(store: TokenStore) -> list[list[Dialog]]:
    """The dialogs of every step, looked up by their ids: labels come from `DIALOGS`."""
    by_ids = {dialog.ids: dialog for dialog in DIALOGS}
    order = RowOrder(ROWS, EPOCHS * ROWS, GLOBAL_BATCH, MICRO_BATCH, dp_size=1, shuffle=True)
    batches = [
        [by_ids[tuple(store.row(row).tokens.tolist())] for row in order.rows_of_step(step, 0).ravel()]
        for step in range(STEPS)
    ]
    first, second = batches[: STEPS // 2], batches[STEPS // 2 :]
    assert all({d.ids for batch in epoch for d in batch} == by_ids.keys() for epoch in (first, second))
    assert first != second
    return batches


@cache
def reference_run(hf: Path, store: Path) -> tuple[list[float], list[float], dict[str, Any], dict[str, float]]:
    """Losses, learning rates, weights before and after, and the evaluation at the end."""
    model = reference.load_model(hf)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, rates = reference.fine_tune(
        model,
        [[(dialog.ids, dialog.labels) for dialog in batch] for batch in batches_of(TokenStore.open(store))],
        micro_batch=MICRO_BATCH,
        lr=LR,
        pad=tiny.VOCABULARY.pad_id,
    )
    weights = {name: (before[name], parameter.detach()) for name, parameter in model.named_parameters()}
    return losses, rates, weights, evaluate(model, TEST_DIALOGS)


@torch.no_grad()
def evaluate(model: Any, dialogs: Sequence[Dialog]) -> dict[str, float]:
    """Loss and accuracy over all targets of these dialogs and by kind, as metrics."""
    first_unit = tiny.VOCABULARY.text_size + 2
    losses: dict[str, list[float]] = {}
    hits: dict[str, list[bool]] = {}
    for dialog in dialogs:
        log_probabilities = model(torch.tensor([dialog.ids])).logits[0].log_softmax(dim=-1)
        for position, label in enumerate(dialog.labels):
            if label >= 0:
                before = log_probabilities[position - 1]
                special = {1: "bos", 2: "eos", first_unit - 2: "continue", first_unit - 1: "correspond"}
                kind = special.get(label, "unit" if label >= first_unit else "text")
                for name in ("", f"_{kind}"):
                    losses.setdefault(f"loss{name}", []).append(-before[label].item())
                    hits.setdefault(f"accuracy{name}", []).append(before.argmax().item() == label)
    return {name: sum(values) / len(values) for name, values in [*losses.items(), *hits.items()]}


def fine_tune(layout: Layout, tiny_model: Any, stores: Stores, run: Path, **sections: Any) -> Path:
    """The product's run; returns its directory."""
    config = jobs.run_config(
        layout,
        task="sft",
        recipe="usdm",
        data={
            "train_data_path": (str(stores.train),),
            "valid_data_path": str(stores.test),
            "seq_length": SEQ_LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": MICRO_BATCH,
            "shuffle": True,
            "row_padding": "step",
        },
        optimizer={"lr": LR, **sections.pop("optimizer", {})},
        training={"num_train_epochs": EPOCHS, **sections.pop("training", {})},
        checkpoint={
            "save": str(run),
            "pretrained_checkpoint": str(tiny_model.root),
            **sections.pop("checkpoint", {}),
        },
        **sections,
    )
    results = run_ranks(layout.ranks, jobs.train, config)
    assert [result["code"] for result in results] == [0] * layout.ranks
    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fine_tuning_equals_plain_pytorch(
    layout: Layout, tiny_model: Any, stores: Stores, tmp_path: Path
) -> None:
    losses, rates, weights, evaluation = reference_run(tiny_model.hf, stores.train)
    run = fine_tune(layout, tiny_model, stores, tmp_path / "run")
    ours = train_lines(run)
    assert [line["lr"] for line in ours] == pytest.approx(rates, rel=1e-5, abs=1e-12)
    assert [line["loss"] for line in ours] == pytest.approx(losses, rel=1e-5)
    batches = batches_of(TokenStore.open(stores.train))
    assert [line["tokens"] for line in ours] == [sum(d.targets for d in batch) for batch in batches]
    trained = hf_tensors(run / f"iter_{STEPS:07d}")
    worst = max(relative_update_error(trained[name], *pair) for name, pair in weights.items())
    assert worst <= 1e-3
    record(layout, MICRO_BATCH, ours, losses, worst)
    (line,) = eval_lines(run)
    assert all(0 < line[name] < 1 for name in ("accuracy", "accuracy_text", "accuracy_unit"))
    assert {name: line[name] for name in evaluation} == pytest.approx(evaluation, rel=1e-4)
    assert line["tokens"] == sum(dialog.targets for dialog in TEST_DIALOGS)


def eval_lines(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


def test_resume_goes_on_with_the_same_rows(tiny_model: Any, stores: Stores, tmp_path: Path) -> None:
    """From inside an epoch, with other replicas."""
    whole = fine_tune(Layout(), tiny_model, stores, tmp_path / "whole", checkpoint={"save_interval": 7})
    resumed = fine_tune(
        Layout(1, 1, 2),
        tiny_model,
        stores,
        tmp_path / "resumed",
        checkpoint={"load": str(whole), "ckpt_step": 7, "pretrained_checkpoint": None},
    )
    expected = [line for line in train_lines(whole) if line["step"] > 7]
    found = train_lines(resumed)
    for name in ("step", "tokens", "consumed_rows"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


def test_blended_stores_are_fine_tuned_on(tiny_model: Any, stores: Stores, tmp_path: Path) -> None:
    """Targets are counted through the blend: `corrected` divides by them."""
    more = random_dialogs(9, seed=3)
    other = write_rows(tmp_path / "other", [[dialog] for dialog in more])
    config = jobs.run_config(
        Layout(),
        task="sft",
        data={
            "train_data_path": ("1", str(stores.train), "3", str(other)),
            "micro_batch_size": 2,
            "row_padding": "step",
        },
        checkpoint={"save": str(tmp_path / "run"), "pretrained_checkpoint": str(tiny_model.root)},
    )
    assert run_ranks(1, jobs.train, config)[0]["code"] == 0
    train = TokenStore.open(stores.train)
    by_ids = {dialog.ids: dialog for dialog in DIALOGS}
    dialogs = [*more[:3], by_ids[tuple(train.row(0).tokens.tolist())]]  # the first four rows, in some order
    line = train_lines(tmp_path / "run")[0]
    assert line["tokens"] == sum(dialog.targets for dialog in dialogs)
    assert line["loss"] == pytest.approx(
        evaluate(reference.load_model(tiny_model.hf), dialogs)["loss"], rel=1e-5
    )
