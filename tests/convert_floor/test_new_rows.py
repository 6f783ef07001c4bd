"""A new row's values depend on the seed, the token id and the tensor, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.new_rows import new_rows
from usdm_megatron.convert.options import ExportOptions, ImportOptions

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
PINNED_EMBEDDING = [-0.0010672984644770622, 0.034606702625751495, -0.014618835411965847, 0.02389177493751049]
PINNED_OUTPUT = [-0.02138710953295231, 0.0002421699755359441, 0.008083590306341648, -0.009850614704191685]


def test_not_on_how_many_are_drawn_or_in_which_order() -> None:
    all_at_once = new_rows(EMBEDDING, range(32_000, 32_050), 16, 0.02, seed=3)
    assert torch.equal(all_at_once[7:9], new_rows(EMBEDDING, range(32_007, 32_009), 16, 0.02, seed=3))


def test_but_on_seed_id_and_tensor() -> None:
    rows = new_rows(EMBEDDING, range(100, 102), 16, 0.02, seed=3)
    others = [
        new_rows(EMBEDDING, range(100, 102), 16, 0.02, seed=4),
        new_rows(OUTPUT, range(100, 102), 16, 0.02, seed=3),
        new_rows(EMBEDDING, range(101, 103), 16, 0.02, seed=3),
    ]
    assert all(not torch.isclose(rows, other).any() for other in others)
    assert not torch.isclose(rows[0], rows[1]).any()


def test_they_have_the_specified_mean_and_spread() -> None:
    rows = new_rows(OUTPUT, range(10_003), 64, 0.05, seed=0).double()
    count = rows.numel()
    assert abs(rows.mean().item()) < 4 * 0.05 / count**0.5
    assert abs(rows.std().item() / 0.05 - 1) < 4 / (2 * count) ** 0.5
    assert abs((rows.abs() > 0.1).double().mean().item() - 0.0455) < 0.002  # two sigma: normal, not uniform
    assert (
        abs(rows.mean(dim=1).std().item() / (0.05 / 8) - 1) < 0.05
    )  # rows are not shifted against each other


def test_the_checkpoint_holds_them_whatever_its_type(
    plain_model: Path, exported: Path, tmp_path: Path
) -> None:
    """`exported` was imported with seed 7 in bf16; the same in fp32 must round to it."""
    run_import(
        ImportOptions(
            hf_path=str(plain_model), save=tmp_path / "ck", extend_vocab="usdm", seed=7, dtype="fp32"
        )
    )
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf"))
    wide, narrow = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", exported))
    for name in (EMBEDDING, OUTPUT):
        expected = new_rows(name, range(32_000, 42_003), 8, 0.05, seed=7)
        assert torch.equal(wide[name][32_000:], expected)
        assert torch.equal(narrow[name][32_000:], expected.bfloat16())


@pytest.mark.parametrize("name", [EMBEDDING, OUTPUT])
def test_values_are_pinned(name: str) -> None:
    """A changed stream would make tomorrow's conversion another model than today's."""
    expected = {EMBEDDING: PINNED_EMBEDDING, OUTPUT: PINNED_OUTPUT}
    row = new_rows(name, range(32_000, 32_001), 4, 0.02, seed=42)[0]
    torch.testing.assert_close(row, torch.tensor(expected[name]), rtol=1e-6, atol=0)
