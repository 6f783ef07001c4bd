"""The resolved configuration of both recipes, as files: a changed default shows in a review."""

from __future__ import annotations

from pathlib import Path

import pytest

from usdm_megatron.cli import main
from usdm_megatron.config_file import load_config
from usdm_megatron.recipes import RecipeName

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("recipe", ["usdm", "corrected"])
def test_resolved_config_is_the_golden_one(recipe: RecipeName, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--recipe", recipe, "--no-bf16", "--print-config"]) == 0
    assert capsys.readouterr().out == (GOLDEN / f"{recipe}.yaml").read_text()
    assert load_config(GOLDEN / f"{recipe}.yaml").recipe == recipe


def test_the_originals_hyperparameters() -> None:
    """`docs/from-usdm.md`: what the original trains with, and what both recipes share."""
    for recipe in ("usdm", "corrected"):
        config = load_config(GOLDEN / f"{recipe}.yaml")
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (2e-5, 0.0, "cosine")
        assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
        assert optimizer.weight_decay == 0.01
        assert (config.training.seed, config.data.seq_length, config.data.shuffle) == (42, 8192, False)
        assert (config.logging.log_interval, config.training.eval_interval) == (50, 1000)
        assert config.checkpoint.save_interval == 1000
        assert config.model.cross_sample_attention == "masked"
