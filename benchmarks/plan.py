"""The planner held to account on the CPU: predicted and measured step time of the same layouts, side by side.

    python benchmarks/plan.py [--steps 8] [--directory runs/benchmark_plan]

Makes a small Mistral and a token store, measures the kernels with as many ranks at once as will train
(`usdm-megatron plan --calibrate`), predicts, and trains every layout for a few steps. Two figures of each:

    work   CPU seconds of a step, a rank's mean: predicted of the kernels alone, measured over all processes
           of the run, so gloo's copies and Python come on top. Comparable however busy the machine is.
    step   wall clock: predicted for a core a rank, measured at its fastest. With fewer cores than ranks, or
           other work on them, the measured one is longer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from usdm_megatron.vocab import Vocabulary

_LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2), (2, 2, 1), (1, 4, 1))  # tp, pp, vpp
_WARM_UP_STEPS = 2
_POLL_S = 0.02
_VOCABULARY = Vocabulary(text_size=4096, unit_count=0)


@dataclass(frozen=True)
class Options:
    """What to predict and train."""

    ranks: int = 4
    steps: int = 8
    hidden: int = 512
    layers: int = 8
    seq_length: int = 512
    global_batch_size: int = 8
    directory: Path = Path("runs/benchmark_plan")
    json: Path | None = None


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
    _run(
        *("plan", "--calibrate", gpu, "--nproc-per-node", options.ranks),
        *("--model", options.directory / "checkpoint", "--seq-length", options.seq_length),
    )
    print(f"{machine()}, {os.cpu_count()} cores, {options.ranks} ranks\n\n{gpu.read_text()}")
    print(f"{'layout':<34}{'work':>8}{'measured':>10}{'ratio':>7}   {'step':>8}{'measured':>10}{'load':>7}")
    results = []
    for sizes in _LAYOUTS:
        result = _one(options, gpu, sizes)
        ratio = result["predicted_work_s"] / result["measured_work_s"]
        print(
            f"{result['layout']:<34}{result['predicted_work_s']:>7.2f}s{result['measured_work_s']:>9.2f}s{ratio:>7.2f}"
            f"   {result['predicted_step_s']:>7.2f}s{result['fastest_step_s']:>9.2f}s{result['load']:>7.1f}",
            flush=True,
        )
        results.append(result)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "layouts": results}, indent=1) + "\n")


def _one(options: Options, gpu: Path, sizes: tuple[int, int, int]) -> dict[str, Any]:
    planned = _predict(options, gpu, sizes)
    assert planned.step is not None
    return {
        "layout": short_name(planned.planned.parallel, "none"),
        "predicted_work_s": _work(planned.step),
        "predicted_step_s": planned.step.total,
        **_train(options, planned),
        "load": os.getloadavg()[0],
    }


def _work(step: StepTime) -> float:
    """What a rank computes on average: no communication, no waiting."""
    stage = step.micro_batches * step.mean_stage - step.tensor_exposed
    return stage + step.accumulate + step.optimizer


def _predict(options: Options, gpu: Path, sizes: tuple[int, int, int]) -> PlannedLayout:
    rows = open_rows([str(options.directory / "data")], [1])  # type: ignore[list-item]  # ints are fractions
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


def _train(options: Options, planned: PlannedLayout) -> dict[str, float]:
    """CPU seconds a rank and step, and the fastest step, behind the first steps."""
    run, parallel = options.directory / "run", planned.planned.parallel
    command = _command(
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
    log = (options.directory / "log").open("w+")
    process = subprocess.Popen(command, env=_environment(), stdout=log, stderr=subprocess.STDOUT, text=True)
    cpu_s: list[float] = []  # of all processes, when each step ended
    while process.poll() is None:
        if len(_train_lines(run)) > len(cpu_s):
            cpu_s.append(_cpu_s(process.pid))
        time.sleep(_POLL_S)
    if process.returncode:
        log.seek(0)
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{log.read()}")
    times = [line["step_time_s"] for line in _train_lines(run)][_WARM_UP_STEPS:]
    shutil.rmtree(run)
    steps = options.steps - 1 - _WARM_UP_STEPS  # behind the last one stands the checkpoint
    work = (cpu_s[options.steps - 2] - cpu_s[_WARM_UP_STEPS - 1]) / steps / options.ranks
    return {"measured_work_s": work, "fastest_step_s": min(times)}


def _train_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def _cpu_s(pid: int) -> float:
    """User and system time of a process and all below it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [
            int(child)
            for path in Path(f"/proc/{pid}/task").glob("*/children")
            for child in path.read_text().split()
        ]
    except FileNotFoundError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(_cpu_s, children))


def _write_inputs(options: Options) -> None:
    """A checkpoint with random weights, and enough rows of samples of the usual lengths."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    heads = options.hidden // 64
    config = MistralConfig(
        vocab_size=_VOCABULARY.size,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=8192,
        sliding_window=4096,
    )
    torch.manual_seed(0)
    model, checkpoint = options.directory / "model", options.directory / "checkpoint"
    MistralForCausalLM(config).save_pretrained(model)
    _run("convert", "import", "--hf-path", model, "--save", checkpoint)
    rows = make_rows(0, options.seq_length, options.global_batch_size * options.steps)
    tokens = np.maximum(rows.tokens % _VOCABULARY.size, 1 + max(_VOCABULARY.bos_id, _VOCABULARY.eos_id))
    ends = np.cumsum(rows.sample_lengths)
    tokens[ends - rows.sample_lengths], tokens[ends - 1] = _VOCABULARY.bos_id, _VOCABULARY.eos_id
    with TokenStoreWriter(options.directory / "data", _VOCABULARY, row_capacity=options.seq_length) as writer:
        writer.append(tokens, rows.sample_lengths, rows.samples_per_row)
        writer.finish()


def _run(*words: object) -> None:
    command = _command(*words)
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "usdm_megatron.cli", *map(str, words)]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    main(tyro.cli(Options))
