"""`usdm-megatron plan`: JSON as promised, quick and without torch, scripts that parse and run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_start_up import probe
from tests.tiny import MODEL, VOCABULARY, random_rows, write_checkpoint, write_hf_model, write_store
from usdm_megatron.cli import main
from usdm_megatron.plan.model_shape import find_model

ROOT = Path(__file__).parents[2]
KEYS = "tp pp vpp cp dp micro_batches recompute memory_gib bubble step_time_s"
KEYS += " tokens_per_s_per_gpu mfu mfu_full_s"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return write_checkpoint(write_hf_model(directory / "hf"), directory / "checkpoint")


def test_512_gpus_without_torch() -> None:
    found = probe("plan", "--json")
    assert found["code"] == 0, found["output"]
    assert set(found["modules"]).isdisjoint(
        {"torch", "megatron", "transformers", "datasets", "sentencepiece"}
    )
    plan = json.loads(found["output"])
    assert plan["model"]["parameters"] == 7_323_676_672
    times = [layout["step_time_s"] for layout in plan["layouts"]]
    assert times == sorted(times) and all(set(KEYS.split()) <= layout.keys() for layout in plan["layouts"])
    assert plan["rejected"] and all(entry["reason"] for entry in plan["rejected"])
    assert all(set(KEYS.split()) <= entry.keys() for entry in plan["rejected"])
    for layout in plan["layouts"]:
        assert sum(layout["memory"].values()) == pytest.approx(layout["memory_gib"])
        for sent in layout["communication"]:
            assert 0 <= sent["exposed_s"] <= sent["busy_s"] * (1 + 1e-9)
    assert {rate["source"] for rate in plan["hardware"]["rates"].values()} == {"published"}


def test_512_gpus_in_five_seconds(tmp_path: Path) -> None:
    """Of this process: how busy the machine is does not count."""
    started_at = time.process_time()
    assert main(["plan", "--json", str(tmp_path / "plan.json")]) == 0
    assert time.process_time() - started_at < 5


def test_a_card_without_rates_gives_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = tmp_path / "card.yaml"
    gpu.write_text(yaml.safe_dump({"memory_gib": 80, "peak_tflops": 400}))
    out = tmp_path / "plan.json"
    assert main(["plan", "--gpu", str(gpu), "--world-size", "64", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    for layout in plan["layouts"]:
        assert [layout[key] for key in ("step_time_s", "tokens_per_s_per_gpu", "mfu", "mfu_full_s")] == [
            None
        ] * 4
        assert layout["memory_gib"] > 0 and layout["missing_rates"]
    text = capsys.readouterr().out
    assert "ranked by recomputed FLOPs and bubble" in text and "null" in text
    assert main(["plan", "--gpu", str(gpu), "--world-size", "64", "--explain"]) == 0
    assert "not predicted, for want of gemm_tflops" in capsys.readouterr().out


def test_the_table_and_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--top", "3"]) == 0
    table = capsys.readouterr().out
    assert "7,323,676,672 parameters" in table and "published: 240 to 170" in table and "… " in table
    assert main(["plan", "--explain", "tp=2,pp=2,vpp=8"]) == 0
    text = capsys.readouterr().out
    for part in (
        "<- the fullest",
        "1/(8 x 8) = 1.56%",
        "MFU, full-S: 55.8",
        "hides: yes",
        "reduce-scatter in fp32",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "a100"], "known are a100-40gb"),
        (["--model", "nowhere"], "is no preset (mistral-7b)"),
        (["--world-size", "0", "--top", "0"], "top is 0"),
        (["--seq-length", "100000"], "exceeds the model's 32768 positions"),
        (["--memory-budget-gib", "nan"], "it must be positive"),
        (["--json", "nowhere/plan.json"], "is no directory"),
        (["--data-path", "nowhere"], "no token store"),
        (["--explain", "tp=3"], "does not divide world size 512"),
        (["--global-batch-size", "1001"], "global batch size 1001 is not divisible"),
        (["--nproc-per-node", "2"], "is for --calibrate"),
        (["--no-bf16"], "--no-bf16, and what a100-40gb reaches is known for bf16; drop it"),
        (["--simulate", "0", "--emit-script", "x.sh"], "leave out --emit-script and --explain"),
        (
            ["--world-size", "12", "--global-batch-size", "48", "--gpu", "a100-80gb", "--emit-script"],
            "12 ranks are no whole number of nodes of 8; plan for a --world-size that is",
        ),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err and not captured.out


def test_models_by_directory(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint has its own vocabulary; a Hugging Face directory gets USDM's extension, once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    found = find_model(str(checkpoint))
    assert found.vocabulary == VOCABULARY == find_model(str(checkpoint / "release")).vocabulary
    hugging_face = checkpoint.parent / "hf"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hugging_face))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    for size, expected in ((300, 10_303), (42_003, 42_003)):
        (tmp_path / "config.json").write_text(
            json.dumps({**MODEL, "vocab_size": size, "architectures": ["MistralForCausalLM"]})
        )
        extended = find_model(str(tmp_path))
        assert extended.vocabulary.size == extended.architecture.vocab_size == expected


def script(checkpoint: Path, tmp_path: Path, *arguments: str) -> Path:
    path = tmp_path / "launch.sh"
    assert main(["plan", "--model", str(checkpoint), *arguments, "--emit-script", str(path)]) == 0
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    return path


def test_a_script_names_what_is_not_set(checkpoint: Path, tmp_path: Path) -> None:
    path = script(
        checkpoint, tmp_path, "--world-size", "16", "--global-batch-size", "64", "--seq-length", "64"
    )
    done = subprocess.run(
        ["bash", str(path)], capture_output=True, text=True, cwd=ROOT, env={"PATH": "/bin:/usr/bin"}
    )
    assert done.returncode != 0 and "CHECKPOINT: is not set" in done.stderr


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return int(probe_socket.getsockname()[1])


def test_a_script_for_four_ranks_runs(checkpoint: Path, tmp_path: Path) -> None:
    """As emitted, on the CPU: TP2 x PP2 with a chunk more, two steps."""
    gpu = tmp_path / "cpu.yaml"
    gpu.write_text(
        yaml.safe_dump({"memory_gib": 4, "peak_tflops": None, "gpus_per_node": 4, "device": "cpu"})
    )
    batch = ("--world-size", "4", "--global-batch-size", "4", "--seq-length", "64")
    path = script(checkpoint, tmp_path, "--gpu", str(gpu), *batch, "--layout", "tp=2,pp=2,vpp=3")
    store = write_store(tmp_path / "data", random_rows(8, 64))
    variables: dict[str, Any] = {
        **os.environ,
        "CHECKPOINT": str(checkpoint),
        "DATA": str(store),
        "OUT": str(tmp_path / "run"),
        "PYTHON": sys.executable,
        "USDM_SKIP_SETUP": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "NNODES", "GPUS_PER_NODE", "EXTRA_ARGS", "TP", "PP"):
        variables.pop(name, None)
    done = subprocess.run(
        ["bash", str(path)], capture_output=True, text=True, cwd=ROOT, env=variables, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    config = yaml.safe_load((tmp_path / "run/run_config.yaml").read_text())
    assert config["parallel"]["num_virtual_stages_per_pipeline_rank"] == 3
    assert config["parallel"]["use_tp_pp_dp_mapping"] and config["parallel"]["sequence_parallel"]
    assert config["recipe"] == "corrected" and config["data"]["global_batch_size"] == 4
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
