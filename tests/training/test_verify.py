"""`convert verify` on real ranks: it passes when it should, fails when it should, and says which columns."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.convert_floor.adapter_checkpoints import write_adapter
from tests.ranks import run_ranks
from tests.training import reference
from usdm_megatron.convert.options import VerifyOptions
from usdm_megatron.convert.verification_row import build_verification_row
from usdm_megatron.convert.verify import LogitsComparison
from usdm_megatron.convert.verify_weights import compare_weights
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.vocab import Vocabulary


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
        hf_path=str(tiny_model.hf),
        load=tiny_model.root,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    for result in run_ranks(tp * pp, verify, options):
        assert 0 < result["max_abs_difference"] <= 1e-5 * result["max_abs_logit"]
        assert set(result["samples"]) >= {1, tiny.WINDOW - 1, tiny.WINDOW, tiny.WINDOW + 1, 3 * tiny.WINDOW}
        assert result["columns"] == tiny.VOCABULARY.size and result["source_is_extended"]


def test_another_model_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    other = tiny.write_hf_model(tmp_path / "other", seed=1)
    options = VerifyOptions(hf_path=str(other), load=tiny_model.root, tensor_model_parallel_size=2)
    for problems in run_ranks(2, verify, options):
        assert "max |Δ| of the logits is" in problems[0] and "does not compute what" in problems[0]
    adapter = write_adapter(tmp_path / "adapter", tiny_model.release, LoraSpec())
    for (problem,) in run_ranks(2, verify, dataclasses.replace(options, load=adapter)):
        assert "holds a LoRA adapter without its base; export it with --merge-lora first" in problem


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
    (result,) = run_ranks(1, verify, VerifyOptions(hf_path=str(source), load=root))
    assert result["columns"] == text and not result["source_is_extended"]
    assert result["max_abs_difference"] <= 1e-5 * result["max_abs_logit"]
    problems = run_ranks(
        1,
        verify,
        VerifyOptions(
            hf_path=str(extended),
            load=tiny.write_checkpoint(source, tmp_path / "small", Vocabulary(text_size=text, unit_count=0)),
        ),
    )[0]
    assert problems == (
        f"not the same model (checkpoint != {extended}): vocab_size: {text} != {tiny.VOCABULARY.size}",
    )


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_tolerance_is_a_part_of_the_largest_logit(factor: float, tmp_path: Path, tiny_model: Any) -> None:
    """A thousand times the logits have a thousand times the rounding; below 1 it is absolute."""
    from safetensors.torch import load_file, save_file

    def scaled(name: str, by: float) -> Path:
        shutil.copytree(tiny_model.hf, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["lm_head.weight"] *= by
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    one, other = scaled("one", factor), scaled("other", factor * (1 + 1e-3))
    options = VerifyOptions(
        hf_path=str(one),
        load=tiny.write_checkpoint(one, tmp_path / "checkpoint"),
        json=tmp_path / "report.json",
    )
    (result,) = run_ranks(1, verify, options)
    row = build_verification_row(tiny.VOCABULARY, tiny.WINDOW, 42)
    ends = np.cumsum(row.sample_lengths)[:-1]
    samples = [sample.tolist() for sample in np.split(np.array(row.tokens), ends)]
    with torch.no_grad():
        largest = reference.sample_logits(reference.load_model(one), samples).abs().max().item()
    assert result["max_abs_logit"] == pytest.approx(largest, rel=1e-5)
    assert (result["max_abs_difference"] > 1e-5) == (factor > 1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and report["allowed_difference"] == pytest.approx(
        1e-5 * max(1, largest), rel=1e-5
    )
    (outcome,) = run_ranks(1, verify, dataclasses.replace(options, hf_path=str(other)))
    if factor > 1:
        assert f"(tolerance 1e-05 of the largest logit, {largest * (1 + 1e-3):.3g})" in outcome[0]
    else:  # a thousandth of logits of a thousandth
        assert result["max_abs_difference"] < outcome["max_abs_difference"] <= 1e-5


def verify_offline(environment: Any, store: Any, options: VerifyOptions) -> Any:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    return verify(environment, store, options)


def test_a_model_of_the_hub(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id, from the hub's cache, in both modes."""
    from huggingface_hub import constants

    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--org--model"
    shutil.copytree(tiny_model.hf, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = VerifyOptions(hf_path="org/model", load=tiny_model.root, hf_cache_dir=tmp_path / "cache")
    two = dataclasses.replace(options, tensor_model_parallel_size=2)
    assert all(result["columns"] == tiny.VOCABULARY.size for result in run_ranks(2, verify_offline, two))
    missing = dataclasses.replace(two, hf_path="org/other")
    for (problem,) in run_ranks(2, verify_offline, missing):
        assert "--hf-path org/other is no directory here nor in the cache" in problem
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert compare_weights(dataclasses.replace(options, mode="weights")).tensors > 50


def test_what_is_not_a_number_never_passes() -> None:
    equal = LogitsComparison(0.0, 3.0, 0, (1,), 1, 5, True, 1, 1, tolerance=1e-5)
    assert equal.passed
    for difference, logit in ((math.nan, 3.0), (math.inf, math.inf), (math.inf, 3.0)):
        assert not dataclasses.replace(equal, max_abs_difference=difference, max_abs_logit=logit).passed


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
    assert json.loads(report.read_text())["passed"]
