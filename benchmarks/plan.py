"""The planner held to account on the CPU: predicted and measured step time of the same layouts, side by side.

    python benchmarks/plan.py [--steps 8] [--directory runs/benchmark_plan]

Makes a small Mistral and a token store, measures the kernels with as many ranks at once as will train
(`usdm-megatron plan --calibrate`), predicts, and trains every layout for a few steps. Two predictions, which
bracket a machine with fewer cores than ranks: `own core` is the planner's, in which an idle rank idles;
`shared` lets the other ranks have the core of an idle one and hides nothing. Times are the fastest of each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from data_inputs import make_rows
from side_by_side import machine

from usdm_megatron.config import DataConfig
from usdm_megatron.data.blend import open_rows
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.plan.activations import kernels_of
from usdm_megatron.plan.hardware import find_hardware
from usdm_megatron.plan.model_shape import find_model
from usdm_megatron.plan.search import PlannedLayout, PlanRequest, judge, short_name
from usdm_megatron.plan.step_time import StepTime
from usdm_megatron.plan.work import RowShape
from usdm_megatron.vocab import USDM_VOCABULARY


@dataclass(frozen=True)
class Options:
    """What to predict and train."""

    ranks: int = 4
    steps: int = 8
    hidden: int = 512
    layers: int = 8
    seq_length: int = 1024
    global_batch_size: int = 8
    directory: Path = Path("runs/benchmark_plan")
    json: Path | None = None


_LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2), (2, 2, 1), (1, 4, 1))  # tp, pp, vpp


def main(options: Options) -> None:
    """Make the inputs, calibrate, predict, train, print."""
    if options.directory.exists():
        raise SystemExit(f"{options.directory} exists; choose another --directory")
    options.directory.mkdir(parents=True)
    try:
        _compare(options)
    finally:
        shutil.rmtree(options.directory)


def _compare(options: Options) -> None:
    _write_inputs(options)
    gpu = options.directory / "cpu.yaml"
    _cli(
        *("plan", "--calibrate", gpu, "--nproc-per-node", options.ranks),
        *("--model", options.directory / "checkpoint", "--seq-length", options.seq_length),
    )
    results = [_one(options, gpu, sizes) for sizes in _LAYOUTS]
    print(f"{machine()}, {os.cpu_count()} cores, {options.ranks} ranks, load {os.getloadavg()[0]:.1f}")
    print(f"{'layout':<34}{'own core':>10}{'shared':>10}{'measured':>10}{'median':>10}   own core / measured")
    for result in results:
        ratio = result["own_core_s"] / result["fastest_s"]
        print(
            f"{result['layout']:<34}{result['own_core_s']:>9.2f}s{result['shared_s']:>9.2f}s"
            f"{result['fastest_s']:>9.2f}s{result['median_s']:>9.2f}s{ratio:>12.2f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "layouts": results}, indent=1) + "\n")


def _one(options: Options, gpu: Path, sizes: tuple[int, int, int]) -> dict[str, float | str]:
    planned = _predict(options, gpu, sizes)
    assert planned.step is not None
    times = _train(options, planned)
    return {
        "layout": short_name(planned.planned.parallel, "none"),
        "own_core_s": planned.step.total,
        "shared_s": _on_shared_cores(planned.step),
        "fastest_s": min(times),
        "median_s": statistics.median(times),
    }


def _on_shared_cores(step: StepTime) -> float:
    """Nobody idles and nothing hides: all ranks' work over all cores."""
    work = step.micro_batches * step.mean_stage - step.tensor_exposed + step.tensor_busy
    hops = step.pipeline if step.bubble else 0.0
    return work + hops + step.data.reduce_s + step.data.gather_s + step.accumulate + step.optimizer


def _predict(options: Options, gpu: Path, sizes: tuple[int, int, int]) -> PlannedLayout:
    rows = open_rows([str(options.directory / "data")], [1])  # type: ignore[list-item]
    request = PlanRequest(
        model=find_model(str(options.directory / "checkpoint")),
        hardware=find_hardware(str(gpu)),
        world_size=options.ranks,
        data=DataConfig(seq_length=options.seq_length, global_batch_size=options.global_batch_size),
        row=RowShape.of_rows(rows, options.seq_length),
        kernels=kernels_of("auto", "cpu"),
        bf16=False,
    )
    judged = judge(request, request.parallel(*sizes, "none"), "none")
    assert isinstance(judged, PlannedLayout), judged.reason
    return judged


def _train(options: Options, planned: PlannedLayout) -> list[float]:
    """Seconds of the steps behind the first two."""
    run, parallel = options.directory / "run", planned.planned.parallel
    _cli(
        *("pretrain", "--nproc-per-node", options.ranks, "--no-bf16"),
        *("--tensor-model-parallel-size", parallel.tensor_model_parallel_size),
        *("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size),
        *("--num-virtual-stages-per-pipeline-rank", parallel.num_virtual_stages_per_pipeline_rank),
        *(["--sequence-parallel"] if parallel.sequence_parallel else []),
        *("--overlap-grad-reduce", "--overlap-param-gather"),
        *("--train-data-path", options.directory / "data", "--seq-length", options.seq_length),
        *("--global-batch-size", options.global_batch_size, "--train-iters", options.steps),
        *("--pretrained-checkpoint", options.directory / "checkpoint", "--save", run, "--log-interval", 1),
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    return [line["step_time_s"] for line in lines if line["kind"] == "train"][2:]


def _write_inputs(options: Options) -> None:
    """A checkpoint with random weights and USDM's vocabulary size, and enough rows."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    heads = options.hidden // 64
    config = MistralConfig(
        vocab_size=USDM_VOCABULARY.size,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=8192,
        sliding_window=4096,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(options.directory / "model")
    _cli(
        "convert",
        "import",
        "--hf-path",
        options.directory / "model",
        "--save",
        options.directory / "checkpoint",
    )
    rows = make_rows(0, options.seq_length, options.global_batch_size * options.steps)
    with TokenStoreWriter(
        options.directory / "data", USDM_VOCABULARY, row_capacity=options.seq_length
    ) as writer:
        writer.append(rows.tokens, rows.sample_lengths, np.asarray(rows.samples_per_row))
        writer.finish()


def _cli(*words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "usdm_megatron.cli", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    main(tyro.cli(Options))
