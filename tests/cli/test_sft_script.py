"""`examples/sft_usdm.sh` and `sft_lora_usdm.sh` with `scripts/launch.sh`, without training."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import tyro

from usdm_megatron.cli import convert
from usdm_megatron.cli.reply import ReplyFlags
from usdm_megatron.cli.sft import parse
from usdm_megatron.config import RunConfig
from usdm_megatron.demo.settings import DEMO
from usdm_megatron.lora_spec import TARGETS

ROOT = Path(__file__).parents[2]
SCRIPTS = ("sft_usdm.sh", "sft_lora_usdm.sh")
VARIABLES = (
    "NNODES", "GPUS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CHECKPOINT", "DATA", "VALID_DATA",
    "OUT", "TP", "PP", "RECIPE", "EPOCHS", "GLOBAL_BATCH_SIZE", "EXTRA_ARGS", "PYTHON", "SLURM_NODEID",
    "LAUNCHER", "DRY_RUN", "PRETRAINED", "LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS",
    "USDM_SKIP_SETUP", "USDM_PYTHON", "HEALTH_CHECK", "DEVICE", "MIN_FREE_GIB", "MIN_BUS_GBS",
)  # fmt: skip


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> str:
    return f"examples/{request.param}"


def run(
    script: str, *arguments: str, root: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    command = ["bash", str(root / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=root)


def executable(path: Path, text: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# --- the cluster run


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A pre-training run and a store, as far as the script looks at them."""
    for name in ("pretrained", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "pretrained/latest_checkpointed_iteration.txt").write_text("20")
    (tmp_path / "dialogs_train.idx").touch()
    return tmp_path


def variables(directory: Path, **more: str) -> dict[str, str]:
    return {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "head",
        "CHECKPOINT": str(directory / "pretrained"),
        "DATA": str(directory / "dialogs_train"),
        "OUT": str(directory / "run"),
        "HEALTH_CHECK": "0",  # tests/demo_floor/test_scripts.py has its test
        **more,
    }


def stand_in(directory: Path, launch: str, dry_run: str = "exit 0") -> str:
    """A `python` that writes down how it is called."""
    path = directory / "python"
    executable(
        path,
        f'printf "%s\\n" "$*" >>{directory}/calls\ncase "$*" in *--dry-run*) {dry_run} ;; esac\n{launch}\n',
    )
    return str(path)


def config_of(command: str) -> RunConfig:
    """Of a line that starts the trainer."""
    return parse(shlex.split(command.split(" sft ")[1]))[1]


def test_it_names_all_that_is_not_set(script: str) -> None:
    result = run(script, NNODES="2")
    assert result.returncode == 2
    for name in ("CHECKPOINT", "DATA", "OUT", "MASTER_ADDR", "NODE_RANK"):
        assert f"{name} is not set" in result.stderr
    refused = run(script, "--help")
    assert refused.returncode == 2 and "no arguments are expected (--help)" in refused.stderr


def test_it_names_the_commands_that_make_what_is_missing(script: str, tmp_path: Path) -> None:
    result = run(script, **variables(tmp_path))
    assert result.returncode == 2
    for command in ("convert_hf_checkpoint.py import", "preprocess_data.py sft", "preprocess_data.py dialog"):
        assert f"python tools/{command}" in result.stderr


def test_of_a_restart_adapters_alone_need_the_checkpoint(script: str, prepared: Path) -> None:
    (prepared / "pretrained/latest_checkpointed_iteration.txt").rename(
        prepared / "run/latest_checkpointed_iteration.txt"
    )
    result = run(script, DRY_RUN="1", **variables(prepared))
    is_refused = "there is no checkpoint at CHECKPOINT" in result.stderr
    assert (result.returncode, is_refused) == ((2, True) if "lora" in script else (0, False))


@pytest.mark.parametrize(
    ("launcher", "exit_json", "expected"),
    [
        (0, '{"code": 0, "step": 5}', 0),
        (1, '{"code": 3, "step": 5}', 3),
        (1, '{"code": 0, "step": 5}', 1),
        (1, None, 1),
    ],
)
def test_the_exit_code_is_the_runs_own(
    script: str, prepared: Path, launcher: int, exit_json: str | None, expected: int
) -> None:
    write = "" if exit_json is None else f"printf '%s' '{exit_json}' >{prepared}/run/exit.json"
    python = stand_in(prepared, f"sleep 0.1\n{write}\nexit {launcher}")
    (prepared / "run/exit.json").write_text('{"code": 3}')  # an earlier start's
    os.utime(prepared / "run/exit.json", (1, 1))
    result = run(script, PYTHON=python, **variables(prepared, EXTRA_ARGS="--keep-best"))
    assert result.returncode == expected, result.stderr
    dry_run, launch = (prepared / "calls").read_text().splitlines()
    assert dry_run.endswith("--dry-run --world-size 16")
    assert "--nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr head" in launch


def test_the_hyperparameters_are_the_originals(script: str, prepared: Path) -> None:
    wanted = {"LORA_R": "4", "LORA_TARGETS": "q_proj o_proj"} if "lora" in script else {}
    result = run(script, DRY_RUN="1", **variables(prepared, EXTRA_ARGS="--keep-best", TP="4", **wanted))
    config = config_of(result.stdout)
    assert (config.recipe, config.training.num_train_epochs, config.checkpoint.keep_best) == ("usdm", 1, True)
    data = config.data
    assert (data.global_batch_size, data.micro_batch_size, data.shuffle) == (64, 2, True)
    assert config.parallel.tensor_model_parallel_size == 4 and config.parallel.sequence_parallel
    lora = config.lora
    assert lora.enabled == ("lora" in script)
    if lora.enabled:
        assert (lora.r, lora.alpha, lora.dropout) == (4, 16, 0.1)
        assert (lora.target_modules, lora.train_new_embeddings) == (("q_proj", "o_proj"), False)


def test_wrong_input_ends_before_the_launch(script: str, prepared: Path) -> None:
    python = stand_in(prepared, "exit 0", dry_run="echo error: wrong >&2; exit 2")
    result = run(script, PYTHON=python, **variables(prepared))
    assert (result.returncode, result.stderr) == (2, "error: wrong\n")
    assert len((prepared / "calls").read_text().splitlines()) == 1


def test_a_stop_signal_reaches_the_launcher(script: str, prepared: Path) -> None:
    python = stand_in(
        prepared,
        f'trap \'echo "{{\\"code\\": 3}}" >{prepared}/run/exit.json; exit 1\' TERM\n'
        f"touch {prepared}/started\nwhile true; do sleep 0.05; done",
    )
    process = subprocess.Popen(
        ["bash", str(ROOT / script)], env=os.environ | variables(prepared, PYTHON=python), cwd=ROOT
    )
    try:
        for _ in range(400):
            if (prepared / "started").exists():
                break
            subprocess.run(["sleep", "0.05"])
        process.terminate()
        assert process.wait(timeout=20) == 3
    finally:
        process.kill()


# --- the demo


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a tree of their own, where commands are written down, not run."""
    root = tmp_path / "checkout"
    for name in ("examples", "scripts"):
        shutil.copytree(ROOT / name, root / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    executable(
        programs / "python",
        f'[ "$1" != -c ] || {{ echo "$0"; exit; }}\nprintf "python %s\\n" "$*" >>{root}/calls\n'
        f'case "$*" in *sft_report*) exit "$(cat {root}/report_code 2>/dev/null || echo 0)" ;; esac\n',
    )
    executable(programs / "usdm-megatron", f'printf "usdm-megatron %s\\n" "$*" >>{root}/calls\n')
    executable(
        root / "examples/pretrain_usdm.sh",
        f'echo "pretrain to $OUT" >>{root}/calls\nmkdir -p "$OUT/exported"\n'
        'touch "$OUT/dialogs_train.idx" "$OUT/exported/config.json"\n'
        'echo \' "passed": true\' >"$OUT/verify.json"\n',
    )
    return root


def demo(script: str, checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout.parent}/bin{os.pathsep}{os.environ['PATH']}"
    return run(script, root=checkout, PATH=path, USDM_SKIP_SETUP="1", **variables)


def finished_demo(directory: Path, at_s: int) -> Path:
    (directory / "exported").mkdir(parents=True)
    for name in ("exported/config.json", "dialogs_train.idx"):
        (directory / name).touch()
    (directory / "verify.json").write_text('{\n "passed": true\n}')
    os.utime(directory / "verify.json", (at_s, at_s))
    return directory


def calls(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()


def test_every_command_of_the_demo_is_accepted(script: str, checkout: Path, tmp_path: Path) -> None:
    """The commands in their order, read by the real parsers; the settings are those of `demo/settings.py`."""
    pretrained, out = finished_demo(tmp_path / "a demo", 1000), tmp_path / "out"
    result = demo(script, checkout, PRETRAINED=str(pretrained), OUT=str(out))
    assert result.returncode == 0, result.stderr
    lora = "lora" in script
    train, *exports, held_out, reply, evaluate, report = calls(checkout)

    config = config_of(train.replace(str(pretrained), shlex.quote(str(pretrained))))
    tuning = DEMO.lora_tuning if lora else DEMO.full_tuning
    assert (config.data.seq_length, config.data.global_batch_size, config.optimizer.lr) == (
        DEMO.seq_length,
        tuning.global_batch_size,
        tuning.lr,
    )
    assert (config.training.train_iters, config.optimizer.lr_warmup_iters) == (
        tuning.train_iters,
        DEMO.lr_warmup_iters,
    )
    assert (config.checkpoint.pretrained_checkpoint, config.checkpoint.save) == (
        f"{pretrained}/run",
        f"{out}/run",
    )
    assert config.data.valid_data_path == f"{pretrained}/dialogs_test"
    assert config.lora.enabled == lora
    if lora:
        assert set(config.lora.target_modules) == set(TARGETS)

    for command in exports:
        quoted = command.replace(str(pretrained), shlex.quote(str(pretrained)))
        tyro.cli(convert.Command, args=shlex.split(quoted)[2:])
    assert len(exports) == 2 and any(f"--hf-path {out}/model" in command for command in exports)
    assert [("--adapter-only" in command, "--merge-lora" in command) for command in exports] == (
        [(True, False), (False, True)] if lora else [(False, False)] * 2
    )
    for command in (reply, evaluate):
        quoted = command.replace(str(pretrained), shlex.quote(str(pretrained)))
        flags = tyro.cli(ReplyFlags, args=shlex.split(quoted)[2:])
        assert (flags.model, flags.max_new_tokens) == (out / "model", DEMO.max_new_tokens)
    for command, module in ((held_out, "held_out"), (report, "sft_report")):
        assert command == (
            f"python -m usdm_megatron.demo.{module} --pretrained {pretrained} --output-dir {out}"
        )


def test_the_newest_finished_demo_is_taken(script: str, checkout: Path) -> None:
    finished_demo(checkout / "runs/demo", 1000)
    newest = finished_demo(checkout / "runs/demo-2", 3000)
    finished_demo(checkout / "runs/demo-3", 2000)
    for number, problem in ((4, '"passed": false'), (5, "")):
        (finished_demo(checkout / f"runs/demo-{number}", 4000) / "verify.json").write_text(problem)
    assert demo(script, checkout).returncode == 0
    assert f"--pretrained-checkpoint {newest.relative_to(checkout)}/run" in calls(checkout)[0]
    base = "runs/sft-lora" if "lora" in script else "runs/sft"
    assert (checkout / base).is_dir()
    assert demo(script, checkout).returncode == 0
    assert f"--save {base}-2/run" in calls(checkout)[7]


def test_without_a_demo_to_begin_with_that_runs_first(script: str, checkout: Path) -> None:
    result = demo(script, checkout, OUT="elsewhere")
    assert result.returncode == 0, result.stderr
    first, train, *_ = calls(checkout)
    assert first == "pretrain to runs/demo" and "it runs first" in result.stdout
    assert "--pretrained-checkpoint runs/demo/run" in train and "--save elsewhere/run" in train


def test_a_demo_that_does_not_reach_its_figures_fails(script: str, checkout: Path) -> None:
    finished_demo(checkout / "runs/demo", 1000)
    (checkout / "report_code").write_text("1")
    assert demo(script, checkout).returncode == 1


def test_an_unfinished_demo_is_refused(script: str, checkout: Path, tmp_path: Path) -> None:
    result = demo(script, checkout, PRETRAINED=str(tmp_path), OUT=str(tmp_path / "out"))
    assert result.returncode == 2
    assert f"PRETRAINED={tmp_path} is no finished demo" in result.stderr
    assert not (tmp_path / "out").exists()
