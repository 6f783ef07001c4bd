"""LoRA runs: PEFT's losses at every layout, small checkpoints over a base that stays as it is, exact resume.

The reference is `reference.fine_tune` on PEFT's model (fp32): same dialogs, rows, optimizer and first A.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.model_floor.lora_jobs import BLOCK, FULL, MLP, RECOMPUTES
from tests.training import reference
from tests.training.conftest import TinyModel
from tests.training.jobs import Layout
from tests.training.test_oracle import record, train_lines
from tests.training.test_resume import killed_after, losses, tensors
from tests.training.test_sft_oracle import LR, MICRO_BATCH, STEPS, Stores, batches_of, fine_tune
from tests.training.test_sft_oracle import stores as stores  # the fixture
from usdm_megatron import lora_spec
from usdm_megatron.checkpoint.adapter_facts import read_adapter_facts
from usdm_megatron.config import CheckpointConfig
from usdm_megatron.config_file import load_config
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import CheckpointError, ConfigError
from usdm_megatron.model.lora.adapter import initial_a
from usdm_megatron.model.lora.names import PROJECTIONS, entry_of_peft, is_adapter_key
from usdm_megatron.train.start import StartPoint, find_start

R, ALPHA, SEED = 4, 12.0, 42
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
LORA = {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": TARGETS, "train_new_embeddings": True}
DROPOUT = {**LORA, "dropout": 0.1}
LAYOUTS = [
    Layout(),
    Layout(2),
    Layout(2, sp=True, extra=MLP),
    Layout(1, 2),
    Layout(1, 1, 2, extra=BLOCK),
    Layout(2, 2, extra=FULL),
    Layout(2, 2, sp=True),
    Layout(2, 1, 2, sp=True),
]
# the rest of layout x recompute; what is always on covers every layout, and every granularity
SWEEP = [
    layout
    for shape in (Layout(), Layout(2), Layout(2, sp=True), Layout(1, 2), Layout(1, 1, 2), Layout(2, 2))
    for extra in RECOMPUTES
    if (layout := replace(shape, extra=extra)) not in LAYOUTS
]


def peft_model(hf: Path) -> Any:
    """PEFT's model of `LORA`, each A as a run with `SEED` draws it."""
    from peft import LoraConfig, get_peft_model

    model = reference.load_model(hf)
    ids = list(range(tiny.VOCABULARY.text_size, tiny.VOCABULARY.size))
    where = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS),
        trainable_token_indices=dict.fromkeys(where, ids),
    )
    model = get_peft_model(model, config)
    projections = {projection.target: projection for projection in PROJECTIONS}
    with torch.no_grad():
        for name, parameter in peft_parameters(model).items():
            if "lora_A" in name:
                _, layer = entry_of_peft(name)
                projection = projections[name.split(".")[-3]]
                parameter.copy_(initial_a(projection, layer or 0, R, parameter.size(1), SEED))
    return model


def peft_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What trains, by the names of `adapter_model.safetensors`."""
    named = model.named_parameters()
    return {name.replace(".default", ""): parameter for name, parameter in named if parameter.requires_grad}


@cache
def reference_run(hf: Path, store: Path) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, what the adapter is at the end, bytes of Adam's state."""
    model = peft_model(hf)
    batches = [[(d.ids, d.labels) for d in batch] for batch in batches_of(TokenStore.open(store))]
    found: list[torch.optim.Optimizer] = []
    original = torch.optim.AdamW

    def recorded(*args: Any, **options: Any) -> torch.optim.Optimizer:
        found.append(original(*args, **options))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", recorded)
        losses, _ = reference.fine_tune(
            model, batches, micro_batch=MICRO_BATCH, lr=LR, pad=tiny.VOCABULARY.pad_id
        )
    state_bytes = sum(t.numel() * t.element_size() for e in found[0].state.values() for t in e.values())
    return losses, {name: p.detach() for name, p in peft_parameters(model).items()}, state_bytes


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", SWEEP, ids=str)
def test_training_equals_peft_in_every_mode(
    layout: Layout, tiny_model: Any, stores: Stores, tmp_path: Path
) -> None:
    expected, _, _ = reference_run(tiny_model.hf, stores.train)
    run = fine_tune(layout, tiny_model, stores, tmp_path / "run", lora=LORA)
    assert [line["loss"] for line in train_lines(run)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_equals_peft(layout: Layout, tiny_model: Any, stores: Stores, tmp_path: Path) -> None:
    expected, adapter, state_bytes = reference_run(tiny_model.hf, stores.train)
    run = fine_tune(layout, tiny_model, stores, tmp_path / "run", lora=LORA)
    ours = train_lines(run)
    assert [line["loss"] for line in ours] == pytest.approx(expected, rel=1e-5)
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"], "it hardly trained: the comparison would be empty"
    stored = tensors(run / f"iter_{STEPS:07d}")
    differences = {}
    for name, value in adapter.items():
        entry, layer = entry_of_peft(name)
        found = stored[entry.core_key] if layer is None else stored[entry.core_key][layer]
        assert found.shape == value.shape, name
        differences[name] = ((found - value).norm() / value.norm()).item()
    assert max(differences.values()) <= 1e-3, differences
    record(layout, MICRO_BATCH, ours, expected, max(differences.values()))
    event = events(run, "lora")[0]
    trainable = sum(value.numel() for value in adapter.values())
    assert event["trainable_parameters"] == trainable
    assert event["optimizer_bytes"] == state_bytes  # each parameter once, whatever the layout


def events(run: Path, what: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "event" and line["what"] == what]


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("tied")
    hf = tiny.write_hf_model(directory / "hf", tie_word_embeddings=True)
    return TinyModel(hf, tiny.write_checkpoint(hf, directory / "checkpoint"))


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(1, 2, 2)], ids=str)
def test_tied_new_rows_on_two_stages(
    layout: Layout, tied_model: TinyModel, stores: Stores, tmp_path: Path
) -> None:
    """Both stages have a copy of them, and each a part of their gradient."""
    expected, _, state_bytes = reference_run(tied_model.hf, stores.train)
    run = fine_tune(layout, tied_model, stores, tmp_path / "run", lora=LORA)
    assert [line["loss"] for line in train_lines(run)] == pytest.approx(expected, rel=1e-5)
    assert events(run, "lora")[0]["optimizer_bytes"] == state_bytes


# --- checkpoints of a run


SAVED_AT = 7


def train(layout: Layout, tiny_model: Any, stores: Stores, run: Path, **checkpoint: Any) -> Path:
    """With dropout; saved every step of the first few, so that each can be compared."""
    where = {"load": str(run), "save_interval": SAVED_AT, **checkpoint}
    return fine_tune(layout, tiny_model, stores, run, lora=DROPOUT, checkpoint=where)


@pytest.fixture(scope="module")
def whole_run(tiny_model: Any, stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(Layout(), tiny_model, stores, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 1, 2, sp=True), Layout(1, 2)], ids=str)
def test_resume_is_bit_exact(
    layout: Layout, whole_run: Path, tiny_model: Any, stores: Stores, tmp_path: Path
) -> None:
    whole, resumed = whole_run, tmp_path / "resumed"
    if layout != Layout():
        whole = train(layout, tiny_model, stores, tmp_path / "whole")
    killed_after(SAVED_AT, whole, resumed)
    train(layout, tiny_model, stores, resumed)
    assert len(losses(whole)) == STEPS
    assert losses(resumed) == losses(whole)  # dropout included
    expected, found = (tensors(run / f"iter_{STEPS:07d}") for run in (whole, resumed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_resume_at_another_layout(tiny_model: Any, stores: Stores, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    fine_tune(Layout(), tiny_model, stores, whole, lora=LORA, checkpoint={"save_interval": SAVED_AT})
    killed_after(SAVED_AT, whole, resumed)
    fine_tune(
        Layout(2, 2, sp=True), tiny_model, stores, resumed, lora=LORA, checkpoint={"load": str(resumed)}
    )
    for (_, loss, norm), (_, again, norm_again) in zip(losses(whole), losses(resumed), strict=True):
        assert (again, norm_again) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    # nothing was drawn in either run, and the first rank's seed is the same at both layouts: what it would
    # draw next is no repetition of the run's beginning
    (first, *_), (anew, *_) = (tensors(run / f"iter_{STEPS:07d}")["random_state"] for run in (whole, resumed))
    assert not torch.equal(anew, first)


def test_a_checkpoint_holds_the_adapter_alone(whole_run: Path, tiny_model: Any) -> None:
    """Its optimizer too; the base is on disk as it was, and known by its hash."""
    directory = whole_run / f"iter_{STEPS:07d}"
    keys = {key for key in tensors(directory) if key != "random_state"}
    kinds = ("optimizer.state.exp_avg_sq.", "optimizer.state.exp_avg.", "optimizer.state.param.")
    adapter = {key for key in keys if is_adapter_key(key)}
    assert len(adapter) == 2 * len(TARGETS) + 2
    assert keys - adapter == {kind + key for kind in kinds for key in adapter}
    facts = read_adapter_facts(directory)
    assert facts is not None and facts.base_directory == str(tiny_model.release)
    assert (facts.spec.r, facts.spec.alpha, facts.spec.dropout) == (R, ALPHA, 0.1)


def test_bf16_trains_and_resumes(tiny_model: Any, stores: Stores, tmp_path: Path) -> None:
    """Masters of adapters and new rows are what was loaded: every loss stays near fp32's."""
    expected, _, _ = reference_run(tiny_model.hf, stores.train)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"lora": LORA, "training": {"bf16": True}}
    fine_tune(Layout(), tiny_model, stores, whole, checkpoint={"save_interval": SAVED_AT}, **options)
    assert [line["loss"] for line in train_lines(whole)] == pytest.approx(expected, rel=1e-2)
    killed_after(SAVED_AT, whole, resumed)
    fine_tune(Layout(), tiny_model, stores, resumed, checkpoint={"load": str(resumed)}, **options)
    assert losses(resumed) == losses(whole)


def test_a_run_goes_on_over_its_own_base_alone(whole_run: Path, tmp_path: Path) -> None:
    """And with its dropout, which another run that starts from the adapter is free to change."""
    config = load_config(whole_run / "run_config.yaml")
    other = tiny.write_checkpoint(tiny.write_hf_model(tmp_path / "hf", seed=1), tmp_path / "other")

    def start(dropout: float = DROPOUT["dropout"], **where: Path) -> StartPoint:
        paths = {name: str(path) for name, path in {"save": tmp_path / "run", **where}.items()}
        lora = replace(config.lora, dropout=dropout)
        return find_start(replace(config, lora=lora, checkpoint=CheckpointConfig(**paths)))

    assert start(load=whole_run).step == STEPS
    with pytest.raises(CheckpointError, match="is another model than the adapter's base"):
        start(load=whole_run, pretrained_checkpoint=other)
    with pytest.raises(ConfigError, match="with --lora-dropout 0.1, now it is 0.2; keep 0.1"):
        start(dropout=0.2, load=whole_run)
    begun = start(dropout=0.2, pretrained_checkpoint=whole_run)
    assert begun.step == 0 and begun.lora is not None and begun.lora.facts.spec.dropout == 0.2


def test_first_b_moves_then_a(tiny_model: Any, stores: Stores, tmp_path: Path) -> None:
    """With B = 0 the first step gives A no gradient; every factor of every layer moves by the second."""
    run = fine_tune(
        Layout(2), tiny_model, stores, tmp_path / "run", lora={**LORA, "target_modules": lora_spec.TARGETS},
        training={"num_train_epochs": None, "train_iters": 3},
        optimizer={"lr_warmup_iters": 0},
        checkpoint={"save_interval": 1},
    )  # fmt: skip
    first, second, third = (tensors(run / f"iter_{step:07d}") for step in (1, 2, 3))
    assert sum(map(is_adapter_key, first)) == 2 * len(lora_spec.TARGETS) + 2
    moment = "optimizer.state.exp_avg."
    for key in filter(is_adapter_key, first):
        early, late = (run[moment + key].flatten(-2).abs().amax(dim=-1) > 0 for run in (first, second))
        assert bool((early != key.endswith("lora_a")).all()) and bool(late.all()), key
        assert not torch.equal(second[key], third[key])


# --- what it starts from


def short(tiny_model: Any, stores: Stores, run: Path, **sections: Any) -> Path:
    """A run of two steps."""
    return fine_tune(
        Layout(), tiny_model, stores, run, training={"num_train_epochs": None, "train_iters": 2}, **sections
    )


def test_an_adapter_trains_on(whole_run: Path, tiny_model: Any, stores: Stores, tmp_path: Path) -> None:
    """`--pretrained-checkpoint ADAPTER`: its values over its base, at step 0; and the run then resumes."""
    base = tmp_path / "moved"
    shutil.copytree(tiny_model.root, base)
    last_loss = train_lines(whole_run)[-1]["loss"]
    start = {"pretrained_checkpoint": str(whole_run)}
    run = short(tiny_model, stores, tmp_path / "run", lora=DROPOUT, checkpoint=start)
    before, after = (tensors(d) for d in (whole_run / f"iter_{STEPS:07d}", run / "iter_0000002"))
    for key in filter(is_adapter_key, before):
        assert 0 < (after[key] - before[key]).norm() < 0.5 * before[key].norm(), key
    assert train_lines(run)[0]["loss"] < 1.1 * last_loss < train_lines(whole_run)[0]["loss"]
    # beside --load, --pretrained-checkpoint is where the base is now
    moved = {"load": str(whole_run), "pretrained_checkpoint": str(base), "ckpt_step": None}
    again = fine_tune(
        Layout(), tiny_model, stores, tmp_path / "again", lora=DROPOUT, training={"num_train_epochs": 3},
        checkpoint=moved,
    )  # fmt: skip
    facts = read_adapter_facts(again / "iter_0000030")
    assert facts is not None and facts.base_directory == str(base / "release")


def test_a_freshly_extended_base_whose_rows_stay_random(
    tiny_model: Any, stores: Stores, tmp_path: Path
) -> None:
    """The start says so, unless a run has trained them or this one does."""
    fresh = tmp_path / "fresh"
    with_provenance(tiny_model.root, fresh, {"options": {"seed": 1}})
    for name, lora, expected in (
        ("frozen", {**LORA, "train_new_embeddings": False}, 1),
        ("trained", LORA, 0),
    ):
        start = {"pretrained_checkpoint": str(fresh)}
        run = short(tiny_model, stores, tmp_path / name, lora=lora, checkpoint=start)
        warnings = events(run, "warning")
        assert len(warnings) == expected
        assert all("--train-new-embeddings trains them" in warning["why"] for warning in warnings)


def with_provenance(root: Path, copy: Path, provenance: dict[str, Any]) -> None:
    """A copy of a converted model that says this of its origin."""
    from usdm_megatron.checkpoint.integrity import INTEGRITY_FILE, write_integrity

    shutil.copytree(root, copy)
    release = copy / "release"
    (release / "provenance.json").write_text(json.dumps(provenance))
    (release / INTEGRITY_FILE).unlink()
    write_integrity(release)
