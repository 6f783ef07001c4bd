"""`verify --mode logits` names the first layer that differs, and by how much: one wrong number at a time."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import tiny
from tests.convert_floor.conftest import edit_json
from tests.oldest import attention_keeps_scores
from tests.ranks import run_ranks
from usdm_megatron.convert.layer_differences import (
    LayerDifferences,
    StateDifference,
    chosen_positions,
    compare_states,
    first_step,
)
from usdm_megatron.convert.options import VerifyOptions

LAYERS = 4
# the tensor of the Hugging Face side that has one wrong number → where the report must see it first
WRONG = {
    "model.embed_tokens.weight": "the embedding",
    "model.layers.0.input_layernorm.weight": "decoder layer 1 of 4 (model.layers.0)",
    "model.layers.1.mlp.up_proj.weight": "decoder layer 2 of 4 (model.layers.1)",
    "model.layers.2.self_attn.k_proj.weight": "decoder layer 3 of 4 (model.layers.2)",
    "model.layers.3.mlp.down_proj.weight": "decoder layer 4 of 4 (model.layers.3)",
    "model.norm.weight": "the final norm",
    "lm_head.weight": "the output layer",
}


class Models(NamedTuple):
    """A model, its checkpoint, and copies of the model with one wrong number each, by tensor."""

    hf: Path
    root: Path
    wrong: dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    directory = tmp_path_factory.mktemp("layers")
    hf = tiny.write_hf_model(directory / "hf", num_hidden_layers=LAYERS)
    root = tiny.write_checkpoint(hf, directory / "checkpoint")
    return Models(hf, root, {name: with_wrong_number(hf, directory / name, name) for name in WRONG})


def with_wrong_number(hf: Path, copy: Path, tensor: str, value: float | None = None) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf, copy)
    weights = load_file(copy / "model.safetensors")
    flat = weights[tensor].view(-1)
    flat[5] = flat[5] + 0.5 if value is None else value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def verify(environment: Any, store: Any, options: list[VerifyOptions], most_positions: int) -> list[Any]:
    """The problems of each comparison (or None), one world after the other."""
    import torch.distributed as dist

    from usdm_megatron.convert import layer_differences
    from usdm_megatron.convert import verify as module
    from usdm_megatron.errors import UserError
    from usdm_megatron.runtime import process_groups

    opened = process_groups.open_process_groups
    chosen: Any = partial(chosen_positions, most=most_positions)
    layer_differences.chosen_positions = chosen
    outcomes: list[Any] = []
    for number, one in enumerate(options):
        world = dist.PrefixStore(str(number), store)
        process_groups.open_process_groups = lambda *args, world=world, **kwargs: opened(
            *args, **{**kwargs, "store": world}
        )
        try:
            module.compare_logits(one, environment)
            outcomes.append(None)
        except UserError as error:
            outcomes.append(error.problems)
    return outcomes


@pytest.mark.parametrize(("tp", "pp", "positions"), [(1, 1, 512), (2, 2, 8), (1, 4, 8)])
def test_the_first_difference_is_at_the_wrong_weight(
    tp: int, pp: int, positions: int, models: Models, tmp_path: Path
) -> None:
    options = [
        VerifyOptions(
            hf_path=str(hf),
            load=models.root,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            json=tmp_path / f"{name}.json",
        )
        for name, hf in {"right": models.hf, **models.wrong}.items()
    ]
    by_rank = run_ranks(tp * pp, verify, options, positions)
    assert all(problems == by_rank[0] for problems in by_rank)
    right, *wrong = by_rank[0]
    assert right is None
    assert json.loads((tmp_path / "right.json").read_text())["passed"] is True
    for (tensor, where), problems in zip(WRONG.items(), wrong, strict=True):
        logits, layers = problems
        assert "max |Δ| of the logits is" in logits and "does not compute what" in logits
        assert layers.startswith(f"first difference after {where}: max |Δ|"), layers
        assert ("embedding equal" in layers) == (where != "the embedding")
        record = json.loads((tmp_path / f"{tensor}.json").read_text())
        assert record["passed"] is False and record["layers"]["positions"] <= positions
        depths = record["layers"]["by_depth"]
        assert depths[record["layers"]["first"]]["where"] == where
        assert [depth["where"] for depth in depths][:: LAYERS + 2] == ["the embedding", "the output layer"]


def test_how_much_it_differs_is_what_transformers_itself_says(models: Models, tmp_path: Path) -> None:
    """Between the right and the wrong model of transformers, by its own hidden states."""
    from transformers import MistralForCausalLM

    from usdm_megatron.checkpoint.facts import read_facts
    from usdm_megatron.convert.verification_row import build_verification_row

    tensor = "model.layers.1.mlp.up_proj.weight"
    options = VerifyOptions(
        hf_path=str(models.wrong[tensor]), load=models.root, json=tmp_path / "report.json"
    )
    run_ranks(1, verify, [options], 512)
    layers = json.loads((tmp_path / "report.json").read_text())["layers"]

    vocabulary = read_facts(models.root / "release").vocabulary
    row = build_verification_row(vocabulary, tiny.WINDOW, 42)
    start = sum(row.sample_lengths[: layers["sample"]])
    sample = torch.tensor(row.tokens[start : start + row.sample_lengths[layers["sample"]]])[None]
    states = []
    for hf in (models.hf, models.wrong[tensor]):
        model = MistralForCausalLM.from_pretrained(hf)
        with torch.no_grad():
            output = model(sample, output_hidden_states=True)
        # transformers' last hidden state is the final norm's; the last layer's own is not in the list
        states.append([*output.hidden_states, output.logits])
    expected = [(one - other).abs().max().item() for one, other in zip(*states, strict=True)]
    found = [depth["max_abs_difference"] for depth in layers["by_depth"]]
    del found[LAYERS]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # where grouped queries have another kernel than transformers' repeated keys: to 5e-7 of the largest state
    rounding = 1e-6 * (states[0][1].abs().max().item() if attention_keeps_scores() else 1)
    assert found[:2] == pytest.approx([0, 0], abs=rounding) and min(found[2:]) > 1e-3


def test_nan_is_a_difference_and_the_report_stays_json(models: Models, tmp_path: Path) -> None:
    broken = with_wrong_number(models.hf, tmp_path / "nan", "model.layers.2.mlp.up_proj.weight", math.nan)
    options = VerifyOptions(hf_path=str(broken), load=models.root, json=tmp_path / "report.json")
    ((problems,),) = run_ranks(1, verify, [options], 512)
    assert problems[1].startswith("first difference after decoder layer 3 of 4 (model.layers.2): max |Δ| nan")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and json.loads(text)["max_abs_difference"] is None


def test_another_architecture_is_refused_by_its_fields(models: Models, tmp_path: Path) -> None:
    other = shutil.copytree(models.hf, tmp_path / "other")
    edit_json(other / "config.json", num_hidden_layers=LAYERS - 1, rms_norm_eps=1e-5)
    ((problems,),) = run_ranks(1, verify, [VerifyOptions(hf_path=str(other), load=models.root)], 512)
    assert problems == (
        f"not the same model (checkpoint != {other}): layers: 4 != 3",
        f"not the same model (checkpoint != {other}): rms_eps: 0.0003 != 1e-05",
    )


def test_the_reference_is_the_class_of_the_table_and_no_code_of_the_sources(
    models: Models, tmp_path: Path
) -> None:
    custom = tmp_path / "custom"
    shutil.copytree(models.hf, custom)
    (custom / "modeling_custom.py").write_text("raise SystemExit('remote code ran')\n")
    edit_json(
        custom / "config.json",
        architectures=["CustomMistralForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_custom.CustomMistralForCausalLM"},
    )
    assert run_ranks(1, verify, [VerifyOptions(hf_path=str(custom), load=models.root)], 512) == [[None]]


def test_a_step_counts_and_slow_growth_does_not() -> None:
    growth = [0.0, *(1e-6 * 1.3**layer for layer in range(32))]  # ends at 3e-3
    assert first_step(growth, rounding=1e-5) is None
    assert first_step([*growth[:20], growth[19] * 11, 1.0], rounding=1e-5) == 20
    assert first_step([0.0, 9e-6, 8.9e-5], rounding=1e-5) is None
    assert first_step([0.0, 9e-6, 1.1e-4], rounding=1e-3) is None
    assert first_step([1e-3, 1.0], rounding=1e-5) == 0
    assert first_step([0.0, math.nan, 1.0], rounding=1e-5) == 1


def test_positions_hold_the_worst_and_cover_the_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    differences = torch.rand(5000, generator=generator)
    differences[4321] = math.nan
    positions = chosen_positions(differences)
    assert positions == sorted(set(positions)) and 500 < len(positions) <= 512
    worst = sorted(range(5000), key=lambda t: -2 if t == 4321 else -differences[t].item())[:256]
    assert set(worst) <= set(positions) and {0, 4999} <= set(positions)
    assert max(b - a for a, b in zip(positions, positions[1:], strict=False)) <= 20
    assert chosen_positions(differences[:512]) == list(range(512))


def test_sizes_of_tokens_and_of_channels_are_not_mixed_up() -> None:
    """A difference is judged by the size of its position or channel, not by the largest number anywhere."""
    generator = torch.Generator().manual_seed(1)
    theirs = [torch.randn(64, 16, generator=generator) for _ in range(5)]
    theirs[2][:, 3] *= 1e4
    theirs[2][7] *= 1e4
    for row, channel in ((20, 3), (7, 5), (20, 5)):
        ours = [state.clone() for state in theirs]
        size = max(theirs[2][row].square().mean().sqrt(), theirs[2][:, channel].square().mean().sqrt())
        ours[2][row, channel] += 0.01 * size
        report = compare_states(ours, theirs, sample=0, tolerance=1e-5)
        assert report.first == 2 and report.by_depth[2].where == "decoder layer 2 of 2 (model.layers.1)"
        assert report.by_depth[2].relative == pytest.approx(0.01, rel=1e-2)
        assert compare_states(ours, theirs, sample=0, tolerance=1.0).first is None


@pytest.mark.parametrize("first", [*range(35), None])
def test_the_table_is_short_and_shows_the_first(first: int | None) -> None:
    names = [
        "the embedding",
        *(f"decoder layer {n}" for n in range(1, 33)),
        "the final norm",
        "the output layer",
    ]
    by_depth = tuple(StateDifference(name, 1e-7, 1e-6) for name in names)
    report = LayerDifferences(sample=3, positions=512, by_depth=by_depth, first=first)
    headline, _, *table = report.describe().splitlines()
    assert len(table) <= 12
    marked = [line for line in table if line.endswith("← first")]
    if first is None:
        assert "no layer stands out" in headline and not marked
    else:
        assert names[first] in headline and len(marked) == 1 and f"  {names[first]} " in marked[0]
    assert (
        replace(report, first=0)
        .describe()
        .startswith("first difference after the embedding: max |Δ| 1e-07\n")
    )
