"""Every row or column of every projection lands where its rank needs it, at TP x PP of {1,2,4} x {1,2,3}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert_floor.conftest import write_hf_model
from tests.ranks import run_ranks
from usdm_megatron.checkpoint.facts import read_facts
from usdm_megatron.checkpoint.store import load_sharded
from usdm_megatron.config import ParallelConfig
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ImportOptions
from usdm_megatron.runtime.ranks import RankEnvironment

LAYERS, HEADS, GROUPS, HEAD_DIM, HIDDEN, FFN, VOCAB, PADDED = 6, 8, 4, 6, 20, 24, 403, 512
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BY_COLUMN = {"o_proj", "down_proj"}  # the side that tensor parallelism cuts
LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3)]


def code(layer: int, projection: str, number: int) -> float:
    """A number for each row (or column) of each projection; exact in fp32."""
    return float(layer * 100_000 + PROJECTIONS.index(projection) * 10_000 + number)


def write_sentinels(directory: Path) -> Path:
    """A model in which every weight says where it belongs."""
    from safetensors.torch import load_file, save_file

    write_hf_model(
        directory,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        vocab_size=VOCAB,
    )
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "_proj" in name:
            axis = 1 if parts[-2] in BY_COLUMN else 0
            codes = [code(int(parts[2]), parts[-2], number) for number in range(tensor.shape[axis])]
            tensor.copy_(torch.tensor(codes).unsqueeze(1 - axis).expand(tensor.shape))
        elif "embed" in name or "lm_head" in name:
            tensor.copy_(torch.arange(VOCAB)[:, None] + (0.25 if "head" in name else 0.0))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def weights_on_rank(
    environment: RankEnvironment, store: Any, tp: int, pp: int, checkpoint: str
) -> dict[str, torch.Tensor]:
    """What the training model of this rank holds after loading, by parameter name; layers by their number."""
    from tests.checkpoint_floor.stock_model import open_groups
    from usdm_megatron.model.architecture import build_transformer_config
    from usdm_megatron.model.build import build_model_chunks

    facts = read_facts(Path(checkpoint))
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    with open_groups(environment, store, tp, pp) as groups:
        config = build_transformer_config(facts.architecture, parallel, dtype=torch.float32)
        (model,) = build_model_chunks(config, facts.architecture, facts.vocabulary, groups, "torch")
        loaded = load_sharded(Path(checkpoint), {"model": model.sharded_state_dict()})
        model.load_state_dict(loaded["model"])
        stage = environment.rank // tp
        weights = {}
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                parts[2] = str(int(parts[2]) + stage * LAYERS // pp)
            weights[".".join(parts)] = parameter.detach().clone()
        return weights


def expected(tp: int, pp: int, rank: int) -> dict[str, list[float]]:
    """First row (or column) of each matrix of a rank, counted out head by head."""
    shard, stage = rank % tp, rank // tp
    wanted: dict[str, list[float]] = {}
    for layer in range(stage * LAYERS // pp, (stage + 1) * LAYERS // pp):
        qkv: list[float] = []
        per_group = HEADS // GROUPS
        for group in range(shard * GROUPS // tp, (shard + 1) * GROUPS // tp):
            heads = range(group * per_group, (group + 1) * per_group)
            qkv += [code(layer, "q_proj", head * HEAD_DIM + i) for head in heads for i in range(HEAD_DIM)]
            qkv += [code(layer, "k_proj", group * HEAD_DIM + i) for i in range(HEAD_DIM)]
            qkv += [code(layer, "v_proj", group * HEAD_DIM + i) for i in range(HEAD_DIM)]
        ffn = range(shard * FFN // tp, (shard + 1) * FFN // tp)
        width = HEADS * HEAD_DIM
        prefix = f"decoder.layers.{layer}"
        wanted[f"{prefix}.self_attention.linear_qkv.weight"] = qkv
        wanted[f"{prefix}.self_attention.linear_proj.weight"] = [
            code(layer, "o_proj", i) for i in range(shard * width // tp, (shard + 1) * width // tp)
        ]
        wanted[f"{prefix}.mlp.linear_fc1.weight"] = [
            code(layer, name, i) for name in ("gate_proj", "up_proj") for i in ffn
        ]
        wanted[f"{prefix}.mlp.linear_fc2.weight"] = [code(layer, "down_proj", i) for i in ffn]
    rows = range(shard * PADDED // tp, (shard + 1) * PADDED // tp)
    if stage == 0:
        wanted["embedding.word_embeddings.weight"] = [float(i) if i < VOCAB else 0.0 for i in rows]
    if stage == pp - 1:
        wanted["output_layer.weight"] = [i + 0.25 if i < VOCAB else 0.0 for i in rows]
    return wanted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    work = tmp_path_factory.mktemp("sentinels")
    run_import(ImportOptions(hf_path=str(write_sentinels(work / "hf")), save=work / "ck"))
    return str(work / "ck" / "release")


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_weight_is_where_it_belongs(tp: int, pp: int, checkpoint: str) -> None:
    for rank, weights in enumerate(run_ranks(tp * pp, weights_on_rank, tp, pp, checkpoint)):
        wanted = expected(tp, pp, rank)
        assert wanted.keys() == {name for name in weights if "norm" not in name}
        for name, codes in wanted.items():
            axis = 1 if "linear_proj" in name or "linear_fc2" in name else 0
            found = weights[name]
            assert found.shape[axis] == len(codes), name
            values = torch.tensor(codes).unsqueeze(1 - axis).expand(found.shape)
            assert torch.equal(found, values), f"rank {rank}: {name}"
