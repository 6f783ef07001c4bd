"""torch_dist on several ranks: any layout reads what any other wrote; failures are everyone's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_floor.stock_model import MODEL, PADDED, build_stock_model, open_groups, weights
from tests.ranks import run_ranks
from usdm_megatron.checkpoint.common_file import read_common
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.checkpoint.store import (
    load_full_tensors,
    load_sharded,
    save_checkpoint,
    single_process_group,
    stored_tensors,
)
from usdm_megatron.errors import CheckpointError
from usdm_megatron.runtime.ranks import RankEnvironment

COMMON = {"args": argparse.Namespace(num_layers=4), "checkpoint_version": 3.0, "iteration": 20}


# ── what the ranks do (importable by the fork server) ──


def save_on_rank(environment: RankEnvironment, store: Any, tp: int, pp: int, *roots: str) -> dict[str, Any]:
    with open_groups(environment, store, tp, pp) as groups:
        model = build_stock_model(groups)
        for root in roots:
            state = {"model": model.sharded_state_dict()}
            saved = save_checkpoint(Path(root), 20, state, COMMON, _write_run_config)
        return {"weights": weights(model), "path": str(saved.path), "size_bytes": saved.size_bytes}


def load_on_rank(
    environment: RankEnvironment, store: Any, tp: int, pp: int, directory: str
) -> dict[str, Any]:
    with open_groups(environment, store, tp, pp) as groups:
        model = build_stock_model(groups, seed=99)
        loaded = load_sharded(Path(directory), {"model": model.sharded_state_dict()})
        model.load_state_dict(loaded["model"])
        return {"weights": weights(model), "iteration": loaded["iteration"]}


def fail_on_rank(environment: RankEnvironment, store: Any, root: str, failing: str) -> dict[str, str]:
    """Each way of failing on one rank, one after the other; returns what each rank was told."""
    from usdm_megatron.checkpoint.distcp_writer import DistcpWriter

    told = {}
    with open_groups(environment, store, 2, 1) as groups:
        model = build_stock_model(groups)
        state = {"model": model.sharded_state_dict()}
        write_data = DistcpWriter.write_data
        for what in failing.split():
            extra = _write_run_config
            if what == "extra_files":
                extra = _disk_full
            elif what == "shards" and environment.rank == 1:
                DistcpWriter.write_data = _disk_full
            elif what == "state" and environment.rank == 1:
                state = {"model": {}}
            try:
                save_checkpoint(Path(root), 40, dict(state), COMMON, extra)
                told[what] = "nothing"
            except CheckpointError as error:
                told[what] = str(error)
            DistcpWriter.write_data = write_data
            state = {"model": model.sharded_state_dict()}
    return told


def misfits_on_rank(environment: RankEnvironment, store: Any, directory: str) -> dict[str, str]:
    """Strict loading of what does not fit; rank 1 asks for something else than rank 0."""
    from dataclasses import replace

    told = {}
    with open_groups(environment, store, 2, 1) as groups:
        for what in ("missing", "shape", "dtype", "extra"):
            model = build_stock_model(groups)
            state = model.sharded_state_dict()
            norm = state["decoder.final_layernorm.weight"]
            if what == "missing" and environment.rank == 1:
                state["more"] = replace(norm, key="decoder.more.weight")
            elif what == "shape":
                state["decoder.final_layernorm.weight"] = replace(
                    norm, data=norm.data.new_zeros(49), local_shape=(49,), global_shape=(49,)
                )
            elif what == "dtype":
                state["decoder.final_layernorm.weight"] = replace(
                    norm, data=norm.data.bfloat16(), dtype=torch.bfloat16
                )
            elif what == "extra":
                del state["decoder.final_layernorm.weight"]
            try:
                load_sharded(Path(directory), {"model": state})
                told[what] = "nothing"
            except CheckpointError as error:
                told[what] = str(error)
            if what == "extra":
                load_sharded(Path(directory), {"model": model.sharded_state_dict()}, strict="requested")
            if what == "dtype":
                cast = load_sharded(Path(directory), {"model": state}, cast=True)
                told["cast"] = str(cast["model"]["decoder.final_layernorm.weight"].dtype)
    return told


def _write_run_config(directory: Path) -> None:
    (directory / "run_config.yaml").write_text("task: pretrain\n")


def _disk_full(*_: object, **__: object) -> Any:
    raise OSError(28, "No space left on device")


# ── tests ──


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One model saved twice at TP2 x PP1 x DP1, and its whole tensors put together by hand."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    ranks = run_ranks(2, save_on_rank, 2, 1, str(first), str(second))
    shards = [rank["weights"] for rank in ranks]
    whole = {}
    for name in shards[0]:
        a, b = (shard[name] for shard in shards)
        if name.endswith("linear_fc1.weight"):  # [gate; up] on each rank
            whole[name] = torch.cat([*(t.chunk(2)[0] for t in (a, b)), *(t.chunk(2)[1] for t in (a, b))])
        elif "norm" in name:
            whole[name] = a
        else:  # row parallel layers are cut along their input
            whole[name] = torch.cat(
                [a, b], dim=1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
            )
    return {"first": first, "second": second, "whole": whole, "size_bytes": ranks[0]["size_bytes"]}


def test_the_layout_is_what_core_documents(saved: dict[str, Any]) -> None:
    directory = saved["first"] / "iter_0000020"
    files = {path.name for path in directory.iterdir()}
    assert files == {
        "common.pt",
        "metadata.json",
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "run_config.yaml",
        "integrity.json",
    }
    assert json.loads((directory / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    assert saved["size_bytes"] == sum(
        path.stat().st_size for path in directory.iterdir() if path.name != "integrity.json"
    )
    common = read_common(directory)
    assert common["args"].num_layers == 4 and common["checkpoint_version"] == 3.0


def test_two_equal_saves_are_equal_bytes(saved: dict[str, Any]) -> None:
    first, second = (saved[name] / "iter_0000020" for name in ("first", "second"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_one_rank_reads_what_two_wrote(saved: dict[str, Any]) -> None:
    (rank,) = run_ranks(1, load_on_rank, 1, 1, str(saved["first"] / "iter_0000020"))
    assert rank["iteration"] == 20
    assert rank["weights"].keys() == saved["whole"].keys()
    for name, value in rank["weights"].items():
        assert torch.equal(value, saved["whole"][name]), name


def test_pipeline_stages_read_what_tensor_parallel_ranks_wrote(saved: dict[str, Any]) -> None:
    ranks = run_ranks(2, load_on_rank, 1, 2, str(saved["first"] / "iter_0000020"))
    seen = set()
    for stage, rank in enumerate(ranks):
        for name, value in rank["weights"].items():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                parts[2] = str(int(parts[2]) + stage * MODEL.layers // 2)
            seen.add(".".join(parts))
            assert torch.equal(value, saved["whole"][".".join(parts)]), name
    assert seen == saved["whole"].keys()


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    run_ranks(2, save_on_rank, 1, 1, str(tmp_path))
    sizes = [(tmp_path / "iter_0000020" / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.25 * sum(sizes)


def test_whole_tensors_and_single_layers_without_a_model(saved: dict[str, Any]) -> None:
    directory, whole = saved["first"] / "iter_0000020", saved["whole"]
    stored = stored_tensors(directory)
    assert stored["embedding.word_embeddings.weight"].shape == (PADDED, MODEL.hidden)
    key = "decoder.layers.mlp.linear_fc1.weight"
    assert stored[key].shape == (MODEL.layers, 2 * MODEL.ffn, MODEL.hidden)
    with single_process_group():
        stacked = load_full_tensors(directory, [key, "output_layer.weight"])
        third = load_full_tensors(directory, [key], layer=3)
        with pytest.raises(CheckpointError, match="does not hold decoder.nothing"):
            load_full_tensors(directory, ["decoder.nothing"])
    assert torch.equal(stacked["output_layer.weight"], whole["output_layer.weight"])
    for layer in range(MODEL.layers):
        assert torch.equal(stacked[key][layer], whole[f"decoder.layers.{layer}.mlp.linear_fc1.weight"])
    assert torch.equal(third[key], stacked[key][3])
    assert not torch.distributed.is_initialized()


def test_a_failure_on_one_rank_is_everyones_and_leaves_nothing(tmp_path: Path) -> None:
    told = run_ranks(2, fail_on_rank, str(tmp_path), "extra_files shards state", timeout_s=60)
    for what in ("extra_files", "shards"):
        assert all("No space left on device" in rank[what] for rank in told), told
    # rank 1 brings none of its shards: the whole tensors would have holes
    assert all("Invalid access pattern" in rank["state"] for rank in told), told
    assert list(tmp_path.iterdir()) == []


def test_strict_loading_names_what_does_not_fit_on_every_rank(saved: dict[str, Any]) -> None:
    told = run_ranks(2, misfits_on_rank, str(saved["first"] / "iter_0000020"), timeout_s=60)
    for rank in told:
        assert "does not hold decoder.more.weight" in rank["missing"]
        assert "decoder.final_layernorm.weight has shape [48], expected [49]" in rank["shape"]
        assert "decoder.final_layernorm.weight is torch.float32, expected torch.bfloat16" in rank["dtype"]
        assert rank["cast"] == "torch.bfloat16"
        assert "decoder.final_layernorm.weight, which this model or optimizer does not have" in rank["extra"]


def test_a_flipped_byte_is_refused_before_core_reads_it(saved: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(saved["first"], tmp_path / "run")
    path = tmp_path / "run" / "iter_0000020" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="__1_0.distcp differs"):
        resolve_checkpoint(tmp_path / "run", fallback=False)


def test_common_is_never_unpickled(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"a": Harmful()}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match="common.pt cannot be read"):
        read_common(tmp_path)
    assert not (tmp_path / "harm").exists()
