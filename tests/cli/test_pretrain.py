"""The command line around `pretrain`: who speaks, what `python -m` returns, what `inspect` shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from usdm_megatron.cli import main
from usdm_megatron.cli.entry import is_main_rank, run_guarded
from usdm_megatron.cli.pretrain import parse
from usdm_megatron.errors import ConfigError

# docs/architecture.md, "Training flags"
TRAINING_FLAGS = """
--train-data-path --data-path --valid-data-path --seq-length --micro-batch-size --global-batch-size
--train-iters --train-samples --num-train-epochs --shuffle --seed --lr --min-lr --lr-decay-style
--lr-warmup-fraction --lr-warmup-iters --lr-decay-iters --weight-decay --clip-grad --adam-beta1
--adam-beta2 --adam-eps --bf16 --no-bf16 --tensor-model-parallel-size --pipeline-model-parallel-size
--num-virtual-stages-per-pipeline-rank --sequence-parallel --recompute-granularity --recompute-modules
--recompute-method --recompute-num-layers --overlap-grad-reduce --overlap-param-gather
--no-overlap-p2p-communication --distributed-timeout-minutes --load --save --pretrained-checkpoint
--ckpt-step --exit-on-missing-checkpoint --save-interval --eval-interval --save-total-limit --keep-best
--log-interval --tensorboard-dir --wandb-project --wandb-exp-name --wandb-entity --dry-run --world-size
--nproc-per-node --config --recipe --print-config --core-attention --cross-sample-attention
--rank --all-ranks --step --gpu --memory-budget-gib --json --decoder-first-pipeline-num-layers
--decoder-last-pipeline-num-layers --pipeline-model-parallel-layout --use-tp-pp-dp-mapping
--no-accumulate-allreduce-grads-in-fp32 --use-precision-aware-optimizer --optimizer-cpu-offload
--deterministic-mode
"""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [sys.executable, "-m", "usdm_megatron.cli", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_user_error_is_one_message_and_code_2() -> None:
    result = command("pretrain", "--lr", "-1", "--seq-length", "0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: data: seq_length is 0; it must be at least 1",
        "error: optimizer: lr is -1.0; it must not be negative",
        "error: optimizer: min_lr 0.0 is above lr -1.0; lower it",
    ]


@pytest.mark.parametrize("flags", [("--lr", "-1"), ("--no-such-flag",)], ids=" ".join)
def test_other_ranks_refuse_in_silence(flags: tuple[str, ...]) -> None:
    for environment in ({"RANK": "1", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}):
        result = command("pretrain", *flags, **environment)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_malformed_rank_environment_is_a_user_error(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["pretrain"]) == 2
    assert "torchrun: rank '0' of 'two' is not a pair of integers" in capsys.readouterr().err


def test_run_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(argv):
        raise ConfigError("first", "second")

    assert run_guarded(refuse, []) == 2
    assert capsys.readouterr().err == "error: first\nerror: second\n"
    assert run_guarded(lambda argv: None, []) == 0
    assert run_guarded(lambda argv: 3, []) == 3
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        run_guarded(lambda argv: 1 // 0, [])


@pytest.mark.parametrize(
    ("environment", "main_rank"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"SLURM_PROCID": "2"}, False)],
)
def test_main_rank(environment: dict[str, str], main_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_rank() is main_rank


def test_flags_are_those_of_the_architecture_document(capsys: pytest.CaptureFixture[str]) -> None:
    """Every training flag that `docs/architecture.md` fixes is in the help."""
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    offered = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    assert set(TRAINING_FLAGS.split()) <= offered
    assert not {flag for flag in offered if "." in flag}


def test_invocation_is_no_part_of_the_run(tmp_path: Path) -> None:
    flags = ["--dry-run", "--world-size", "8", "--nproc-per-node", "4", "--print-config"]
    invocation, config = parse(flags)
    assert (invocation.dry_run, invocation.world_size, invocation.nproc_per_node) == (True, 8, 4)
    assert config == parse([])[1]


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "nothing"]], ids=" ".join)
def test_inspect_what(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "inspect store | step | checkpoint | env" in capsys.readouterr().err


def test_inspect_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny.write_store(tmp_path / "rows", tiny.random_rows(6, 32))
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{train_data_path: {store}, global_batch_size: 4, seq_length: 32}}\n")
    assert main(["inspect", "step", "1", "--config", str(path), "--world-size", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == ["dp rank 0: 0 2", "dp rank 1: 1 3"]
    assert main(["inspect", "step", "2", "--config", str(path), "--world-size", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "dp rank 0: 4", "dp rank 1: 5", "dp rank 2: (no rows)", "dp rank 3: (no rows)",
    ]  # fmt: skip
    for step in ("0", "3"):
        assert main(["inspect", "step", step, "--config", str(path)]) == 2
        assert f"{step} is not one of this run's steps, 1 to 2" in capsys.readouterr().err


def test_inspect_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "env"]) == 0
    report = capsys.readouterr().out
    for package in ("torch", "megatron-core", "transformers", "cuda"):
        assert package in report
