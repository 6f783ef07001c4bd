"""`convert verify` on real ranks: it passes when it should, fails when it should, and says which columns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from usdm_megatron.convert.options import VerifyOptions


def verify(environment: Any, store: Any, options: VerifyOptions) -> Any:
    from usdm_megatron.convert import verify as module
    from usdm_megatron.errors import UserError
    from usdm_megatron.runtime import process_groups

    opened = process_groups.open_process_groups

    def at_file(*args: Any, **kwargs: Any) -> Any:
        return opened(*args, **{**kwargs, "store": store})

    process_groups.open_process_groups = at_file
    try:
        return dataclasses.asdict(module.compare_logits(options, environment))
    except UserError as error:
        return error.problems


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (1, 3)])
def test_equal_models(tp: int, pp: int, tiny_model: Any) -> None:
    options = VerifyOptions(
        hf_path=tiny_model.hf,
        load=tiny_model.root,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    for result in run_ranks(tp * pp, verify, options):
        assert 0 < result["max_abs_difference"] <= 1e-5
        assert set(result["samples"]) >= {1, tiny.WINDOW - 1, tiny.WINDOW, tiny.WINDOW + 1, 3 * tiny.WINDOW}
        assert result["columns"] == tiny.VOCABULARY.size and result["source_is_extended"]


def test_another_model_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    other = tiny.write_hf_model(tmp_path / "other", seed=1)
    options = VerifyOptions(hf_path=other, load=tiny_model.root, tensor_model_parallel_size=2)
    for problems in run_ranks(2, verify, options):
        assert "max |Δ| of the logits is" in problems[0] and "does not compute what" in problems[0]


def test_unextended_source(tmp_path: Path) -> None:
    """The source knows no speech tokens: its columns are compared, on ids that both know."""
    text = tiny.VOCABULARY.text_size
    source = tiny.write_hf_model(tmp_path / "source", vocab_size=text)
    extended = tiny.write_hf_model(tmp_path / "extended")
    from transformers import MistralForCausalLM

    small, large = (MistralForCausalLM.from_pretrained(path) for path in (source, extended))
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            parameter[: small.get_parameter(name).shape[0]] = small.get_parameter(name)
    large.save_pretrained(extended)
    root = tiny.write_checkpoint(extended, tmp_path / "checkpoint")
    (result,) = run_ranks(1, verify, VerifyOptions(hf_path=source, load=root))
    assert result["columns"] == text and not result["source_is_extended"]
    assert result["max_abs_difference"] <= 1e-5


def test_outcome_is_written_once(tiny_model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command itself, at two ranks that it starts."""
    from usdm_megatron.cli import main

    report = tmp_path / "verify.json"
    code = main(
        ["convert", "verify", "--hf-path", str(tiny_model.hf), "--load", str(tiny_model.root)]
        + ["--tensor-model-parallel-size", "2", "--json", str(report)]
    )
    assert code == 0
    assert capfd.readouterr().out.count("max |Δ| =") == 1
    assert json.loads(report.read_text())["max_abs_difference"] <= 1e-5
