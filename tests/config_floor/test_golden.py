"""The resolved configuration of both tasks and recipes, as files: a changed default shows in a review."""

from __future__ import annotations

from pathlib import Path

import pytest

from usdm_megatron.cli import main
from usdm_megatron.config_file import load_config

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = {
    ("pretrain", "usdm"): "usdm",
    ("pretrain", "corrected"): "corrected",
    ("sft", "usdm"): "sft_usdm",
    ("sft", "corrected"): "sft_corrected",
}


@pytest.mark.parametrize(("task", "recipe"), FILES)
def test_resolved_config_is_the_golden_one(
    task: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = GOLDEN / f"{FILES[task, recipe]}.yaml"
    assert main([task, "--recipe", recipe, "--no-bf16", "--print-config"]) == 0
    assert capsys.readouterr().out == golden.read_text()
    assert main([task, "--config", str(golden), "--print-config"]) == 0
    assert capsys.readouterr().out == golden.read_text()
    config = load_config(golden)
    assert (config.task, config.recipe) == (task, recipe)


@pytest.mark.parametrize("name", FILES.values())
def test_the_originals_hyperparameters(name: str) -> None:
    """`docs/from-usdm.md`: what the original trains with, and what tasks and recipes share."""
    config = load_config(GOLDEN / f"{name}.yaml")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (2e-5, 0.0, "cosine")
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert optimizer.weight_decay == 0.01
    assert (config.training.seed, config.data.seq_length) == (42, 8192)
    assert (config.logging.log_interval, config.training.eval_interval) == (50, 1000)
    assert config.checkpoint.save_interval == 1000
    assert config.model.cross_sample_attention == "masked"


@pytest.mark.parametrize("name", ["sft_usdm", "sft_corrected"])
def test_the_originals_fine_tuning_batch(name: str) -> None:
    """`train_sft.py`: 2 dialogs a forward pass, 4 accumulated (on one process), shuffled."""
    data = load_config(GOLDEN / f"{name}.yaml").data
    assert (data.micro_batch_size, data.global_batch_size, data.shuffle) == (2, 2 * 4, True)
    assert data.row_padding == "step"
