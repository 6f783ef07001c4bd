"""Simulated ranks equal real ones; a world that is no run is caught, each way it can go wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.plan_floor import simulate_jobs as jobs
from tests.ranks import run_ranks
from tests.training.jobs import Layout
from usdm_megatron.plan.simulate import Simulation
from usdm_megatron.plan.simulation import GIB, OwnedPart, RunShape, SimulatedRank

OVERLAP = (("overlap_grad_reduce", True), ("overlap_param_gather", True))
NEAR_STAGES = (("use_tp_pp_dp_mapping", True),)
UNEVEN = (("decoder_first_pipeline_num_layers", 2),)
REAL = {
    "tp2 dp2 sp": (Layout(tp=2, dp=2, sp=True), {"training": {"bf16": True}}),
    "pp2 vpp3 dp2": (Layout(pp=2, vpp=3, dp=2, extra=OVERLAP), {"training": {"bf16": True}}),
    "pp2 dp2 near, uneven": (Layout(pp=2, dp=2, extra=NEAR_STAGES + UNEVEN), {}),
    "lora": (
        Layout(tp=2, pp=2),
        {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.0, "train_new_embeddings": True}},
    ),
}
SIXTEEN = {
    "sp, vpp3, overlap": Layout(tp=2, pp=2, dp=4, vpp=3, sp=True, extra=OVERLAP),
    "near stages": Layout(tp=2, pp=4, dp=2, extra=(*NEAR_STAGES, ("decoder_first_pipeline_num_layers", 1),
                                                   ("decoder_last_pipeline_num_layers", 1))),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 rows: the second step of 16 is not full."""
    return tiny.write_store(tmp_path_factory.mktemp("rows") / "P", tiny.random_rows(25, 64))


@pytest.fixture(scope="module")
def worlds(store: Path) -> Worlds:
    runs = {name: jobs.shape_of(layout, store, options) for name, (layout, options) in REAL.items()}
    runs |= {name: jobs.shape_of(layout, store) for name, layout in SIXTEEN.items()}
    return Worlds({**runs, "tied": jobs.shape_of(Layout(tp=2, pp=2, dp=2), store, tied=True)})


class Worlds(dict[str, Simulation]):
    """Each run of this file, simulated when it is asked for, in a process of its own."""

    def __init__(self, runs: dict[str, RunShape]) -> None:
        super().__init__()
        self._runs = runs

    def __missing__(self, name: str) -> Simulation:
        ((self[name],),) = run_ranks(1, jobs.simulated, [self._runs[name]], timeout_s=250)
        return self[name]


@pytest.mark.parametrize("name", REAL)
def test_a_simulated_rank_equals_the_real_one(name: str, store: Path, worlds: Worlds) -> None:
    layout, options = REAL[name]
    run = jobs.shape_of(layout, store, options)
    for rank, real in zip(worlds[name].ranks, run_ranks(4, jobs.measured, run, layout), strict=True):
        assert rank.parameters == real["parameters"]
        assert [buffer.elements for buffer in rank.buffers] == real["elements"]
        parts = {name: (part.start, part.stop) for name, part in rank.owned.items() if part.stop > part.start}
        assert parts == real["owned"]
        held = sorted((shard.key, shard.offset, shard.shape) for shard in rank.shards)
        assert held == real["boxes"]
        assert {axis: rank.groups[axis] for axis in real["groups"]} == real["groups"]
        assert rank.rows == real["rows"]
        memory = rank.memory
        assert (memory.weights, memory.gradients) == (real["weights"], real["gradients"])
        assert memory.step == pytest.approx(real["step"], abs=64)  # but for scalars


@pytest.mark.parametrize("name", [*REAL, *SIXTEEN, "tied"])
def test_the_ranks_of_a_world_make_up_one_run(name: str, worlds: Worlds) -> None:
    world = worlds[name]
    assert world.faults == ()
    layout = world.run.layout
    assert [rank.place for rank in world.ranks] == [
        layout.coordinates(rank) for rank in range(layout.world_size)
    ]
    assert {(world.ranks[r].place.tp, world.ranks[r].place.pp) for r in world.traced} == {
        (tp, pp) for tp in range(layout.tp) for pp in range(layout.pp)
    }
    assert all(rank.memory.peak is not None for rank in world.ranks)


def test_rows_of_the_second_step(worlds: Worlds) -> None:
    """By hand: row 16 + 4 k + r is micro-batch k of replica r of four, and 9 of the 16 rows are there."""
    for rank in worlds["sp, vpp3, overlap"].ranks:
        slots = [4 * k + rank.place.dp for k in range(4)]
        assert rank.rows == tuple((16 + slot if slot < 9 else -1,) for slot in slots)


# ── what goes wrong is caught: a world of sound records with one of them changed ──


def faults_of(world: Simulation, *changed: SimulatedRank) -> tuple[str, ...]:
    from usdm_megatron.plan.sweep_checks import world_faults

    ranks = {rank.rank: rank for rank in (*world.ranks, *changed)}
    return world_faults(world.run, list(ranks.values()), rows_of_step=9)


def shard_changes(rank: SimulatedRank, of: str, **fields: Any) -> SimulatedRank:
    """The rank with its first shard of that tensor changed."""
    index = next(i for i, shard in enumerate(rank.shards) if shard.key.endswith(of))
    shard = dataclasses.replace(rank.shards[index], **fields)
    return dataclasses.replace(rank, shards=(*rank.shards[:index], shard, *rank.shards[index + 1 :]))


QKV = "self_attention.linear_qkv.weight"  # [6, 128, 32], split in two by tp
BREAKS = {
    "gap": (
        lambda r: shard_changes(r, QKV, shape=(1, 63, 32)),
        r"linear_qkv\.weight, replica \(0, 0, 0\): \[0, 63, 0\] to \[1, 64, 32\] of \[6, 128, 32\] is held "
        "by no rank",
    ),
    "overlap": (
        lambda r: shard_changes(r, QKV, offset=(0, 32, 0)),
        r"\[0, 64, 0\] to \[1, 96, 32\] of \[6, 128, 32\] is held by ranks 0 1",
    ),
    "beyond": (
        lambda r: shard_changes(r, QKV, offset=(6, 0, 0)),
        r"rank 0 holds up to \[7, 64, 32\], beyond",
    ),
    "shape": (
        lambda r: shard_changes(r, QKV, global_shape=(6, 64, 32)),
        r"rank 0 holds a part of \(6, 64, 32\), the table says \(6, 128, 32\)",
    ),
    "unknown tensor": (
        lambda r: shard_changes(r, QKV, key="decoder.layers.linear_kv.weight"),
        "linear_kv.weight: rank 0 holds a part of it, and the table knows no such tensor",
    ),
    "replica": (
        lambda r: dataclasses.replace(r, shards=tuple(s for s in r.shards if "word_embeddings" not in s.key)),
        r"word_embeddings\.weight, replica \(0, 0, 0\): \[0, 0\] to \[256, 32\] of \[512, 32\] is held by no",
    ),
    "masters": (
        lambda r: owned_changes(r, lambda part: OwnedPart(part.elements, part.start, part.stop - 1)),
        r"chunk_0\.\S+ of ranks 0 2 4 6: no rank updates element [\d,]+ of [\d,]+",
    ),
    "masters twice": (
        lambda r: owned_changes(r, lambda part: OwnedPart(part.elements, part.start, part.stop + 2)),
        r"ranks 0 and 2 both update elements [\d,]+ to [\d,]+",
    ),
    "group": (
        lambda r: dataclasses.replace(r, groups={**r.groups, "mp": (0, 1, 8, 10)}),
        "group mp: rank 9 has 0 1 8 9 in it, rank 0 0 1 8 10",
    ),
    "group of another": (
        lambda r: dataclasses.replace(r, groups={n: m for n, m in r.groups.items() if n != "tp_dp_cp"}),
        "group tp_dp_cp: rank 1 has 0 1 2 3 4 5 6 7 in it, rank 0 none",
    ),
    "axis": (
        lambda r: dataclasses.replace(r, groups={**r.groups, "tp": (0, 2)}),
        "rank 0: its tp group is 0 2, the layout's 0 1",
    ),
    "next stage": (
        lambda r: dataclasses.replace(r, next_stage=9),
        "rank 0: its next stage is rank 9 at Rank",
    ),
    "nobody": (lambda r: dataclasses.replace(r, previous_stage=None), "rank 0: has no previous stage"),
    "not heard": (
        lambda r: dataclasses.replace(r, previous_stage=12),
        "rank 8: its next stage is rank 0, whose previous stage is 12",
    ),
    "another stage": (
        lambda r: dataclasses.replace(r, parameters={**r.parameters, "chunk_0.decoder.final": (3,)}),
        "ranks 0 and 2 hold the same stage, with other shapes: chunk_0.decoder.final",
    ),
    "other buffers": (
        lambda r: dataclasses.replace(r, buffers=r.buffers[1:]),
        "same stage, with other buffers",
    ),
    "other rows": (
        lambda r: dataclasses.replace(r, rows=r.rows[::-1]),
        "ranks 0 and 1 are of one replica and read other rows",
    ),
}


def owned_changes(rank: SimulatedRank, change: Any) -> SimulatedRank:
    """The rank with another part of the first weight that it shares with other replicas."""
    name = next(name for name, part in rank.owned.items() if 0 < part.stop < part.elements)
    return dataclasses.replace(rank, owned={**rank.owned, name: change(rank.owned[name])})


@pytest.mark.parametrize("name", BREAKS)
def test_a_world_that_is_no_run(name: str, worlds: Worlds) -> None:
    change, message = BREAKS[name]
    world = worlds["sp, vpp3, overlap"]
    assert faults_of(world) == ()
    faults = faults_of(world, change(world.ranks[0]))
    assert re.search(message, "\n".join(faults)), faults


def test_rows_read_twice_or_never(worlds: Worlds) -> None:
    world = worlds["sp, vpp3, overlap"]
    replica = [dataclasses.replace(r, rows=((16,), *r.rows[1:])) for r in world.ranks if r.place.dp == 1]
    faults = faults_of(world, *replica)
    assert faults == (
        "row 16 is read 2 times, by data parallel ranks 0 1",
        "8 different rows are read, the step has 9",
    )


def test_a_replica_without_its_part(worlds: Worlds) -> None:
    world = worlds["sp, vpp3, overlap"]
    without = [
        dataclasses.replace(r, shards=tuple(s for s in r.shards if s.key != "decoder.final_layernorm.weight"))
        for r in world.ranks
    ]
    assert faults_of(world, *(r for r in without if r.place.dp == 2)) == (
        "decoder.final_layernorm.weight: data parallel replica 2 of 4 has none of it",
    )
    assert "is in the table, and no rank holds a part of it" in faults_of(world, *without)[0]


def test_many_faults_are_counted(worlds: Worlds) -> None:
    world = worlds["sp, vpp3, overlap"]
    moved = [dataclasses.replace(r, groups={**r.groups, "tp": (r.rank,)}) for r in world.ranks]
    assert faults_of(world, *moved)[8:] == ("… and 8 more of this kind",)


def test_broken_code_is_caught(store: Path) -> None:
    """Not records: the run itself, when replicas read the same rows or ranks are counted otherwise."""
    run = jobs.shape_of(Layout(tp=1, pp=2, dp=2), store)
    (faults,) = run_ranks(1, jobs.read_twice, run)
    assert [
        fault for fault in faults if re.match(r"row \d+ is read 2 times, by data parallel ranks 0 1", fault)
    ]
    with pytest.raises(AssertionError):  # the stage that is built is not the one that core's groups are for
        run_ranks(1, jobs.wrongly_placed, run)


# ── memory ──


def test_memory_that_does_not_suffice(worlds: Worlds) -> None:
    from usdm_megatron.plan.sweep_checks import memory_problems

    ranks = worlds["near stages"].ranks
    worst = max(rank.memory.peak for rank in ranks)
    assert memory_problems(ranks, worst / GIB) == ()
    (problem,) = memory_problems(ranks, (worst - 1) / GIB)
    over = [rank.rank for rank in ranks if rank.memory.peak == worst]
    assert f"{len(over)} of 16 ranks need more than" in problem and f"the most rank {over[0]} " in problem


def test_a_few_micro_batches_need_what_many_do() -> None:
    """What is traced is the start of a step; the rest of it needs no more."""
    layouts = [Layout(), Layout(pp=2), Layout(pp=3), Layout(pp=2, vpp=3, extra=OVERLAP), Layout(pp=3, vpp=2)]
    runs = [jobs.shape_of(layout, None, {"data": {"global_batch_size": 18}}) for layout in layouts]
    (steps,) = run_ranks(1, jobs.longer_steps, runs)
    for few, many in steps:
        assert few == many


def test_stand_ins_keep_what_torchs_kernel_keeps() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    (held,) = run_ranks(1, jobs.kernel_bytes)
    (forward, backward), (torchs_forward, torchs_backward) = held["ours"], held["torch's"]
    assert torchs_forward - forward == 16  # two counters of a random state that nothing uses
    assert torchs_backward - backward == 2 * 16 + 8 * 96 * 4  # and zeros for gradients of what nothing reads


# ── the command line ──


@pytest.fixture(scope="module")
def arguments(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("model")
    root = tiny.write_checkpoint(tiny.write_hf_model(directory / "hf"), directory / "checkpoint")
    return [
        "pretrain", "--pretrained-checkpoint", str(root), "--train-data-path", str(store),
        "--save", str(directory / "run"),
        "--seq-length", "64", "--global-batch-size", "8",
        "--tensor-model-parallel-size", "2", "--dry-run", "--world-size", "8",
    ]  # fmt: skip


BAD_FLAGS = [
    (["--rank", "8"], "--rank 8 is not one of 8 ranks, 0 to 7"),
    (["--rank", "0", "--step", "9"], "--step 9 is not one of this run's steps, 1 to 4"),
    (["--rank", "0", "--all-ranks"], "--rank and --all-ranks are given together"),
    (["--step", "2"], "add --rank R or --all-ranks"),
    (["--rank", "0", "--gpu", "a100-40g"], "did you mean a100-40gb"),
    (["--rank", "0", "--gpu", "h100", "--memory-budget-gib", "3"], "--gpu and --memory-budget-gib are given"),
    (["--rank", "0", "--memory-budget-gib", "0"], "--memory-budget-gib is 0.0; it must be positive"),
    (["--rank", "0", "--step", "0"], "--step is 0; steps are counted from 1"),
    (["--rank", "0", "--memory-budget-gib", "0.0001"], "1 of 1 ranks need more than 0.0001 GiB"),
    (["--rank", "0", "--no-dry-run"], "are for --dry-run; add it"),
]


def test_one_rank_on_the_command_line(arguments: list[str]) -> None:
    lines = [[*arguments, "--rank", "5", "--step", "4"], *([*arguments, *flags] for flags, _ in BAD_FLAGS)]
    (((code, out, err), *refused),) = run_ranks(1, jobs.dry_runs, lines)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "rank 5 of 8: tp 1 of 2, pp 0 of 1, dp 2 of 4, fp32"
    assert "6 x decoder.layers.*.self_attention.linear_qkv.weight [64, 32]" in out
    assert re.search(r"^  dp group +1 3 5 7$", out, re.M)
    assert re.search(r"^  rows +step 4: none, and 2 empty, in 2 micro-batches$", out, re.M)
    assert re.search(r"^  memory +\d\.\d\d MiB at most: weights 0.\d\d MiB, gradients", out, re.M)
    for (_, message), (code, _, err) in zip(BAD_FLAGS, refused, strict=True):
        assert code == 2 and err.startswith("error: ") and message in err, err


def test_all_ranks_on_the_command_line(arguments: list[str]) -> None:
    """In processes of its own, as users have it; says nothing but JSON."""
    result = subprocess.run(
        [sys.executable, "-m", "usdm_megatron.cli", *arguments, "--all-ranks", "--json", "--gpu", "h100"],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    # torch 2.6 for CUDA, where there is a compiler for it and no GPU
    said = [line for line in result.stderr.splitlines() if not line.startswith("No CUDA runtime is found")]
    assert (result.returncode, said) == (0, [])
    tree = json.loads(result.stdout)
    assert tree["faults"] == tree["problems"] == [] and tree["budget_gib"] == 70.4
    assert [rank["rank"] for rank in tree["ranks"]] == list(range(8))
    assert all(rank["memory"]["peak"] > 0 for rank in tree["ranks"])
    first = tree["ranks"][0]
    assert first["place"] == {"tp": 0, "dp": 0, "pp": 0} and first["rows"] == [[0], [4]]


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_512_ranks_of_mistral_7b(tmp_path: Path) -> None:
    from usdm_megatron.plan.model_shape import find_model
    from usdm_megatron.plan.simulate import simulate

    layout = Layout(tp=2, pp=2, dp=128, vpp=8, sp=True, extra=OVERLAP)
    shape = find_model("mistral-7b")
    options = {"training": {"bf16": True}, "data": {"global_batch_size": 1024, "seq_length": 8192}}
    rows = tiny.write_store(tmp_path / "P", tiny.random_rows(1100, 64), shape.vocabulary)
    run = dataclasses.replace(
        jobs.shape_of(layout, rows, options), architecture=shape.architecture, vocabulary=shape.vocabulary
    )
    world = simulate(run, budget_gib=35.0)
    assert world.faults == world.problems == ()
    read = {row for rank in world.ranks for micro_batch in rank.rows for row in micro_batch}
    assert read == set(range(1024))  # each once in a replica: a fault otherwise
    held = {(rank.place.tp, rank.place.pp): rank.parameter_count for rank in world.ranks}
    norms = sum(held.values()) - padded_parameters(run)
    assert norms == 65 * 4096  # held by both tensor parallel ranks: two of each layer, and the last
    assert 28 * GIB < world.worst.memory.peak < 31 * GIB


def padded_parameters(run: RunShape) -> int:
    model, padded = run.architecture, run.vocabulary.padded_size
    layer = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads) + 3 * model.hidden * model.ffn
    return model.layers * (layer + 2 * model.hidden) + 2 * padded * model.hidden + model.hidden
