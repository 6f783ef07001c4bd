"""The cluster scripts without a cluster: they parse, say what they would start, and refuse what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples/cluster"
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("examples/*.sh", "examples/cluster/*.s*", "scripts/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)
LAUNCH_VARIABLES = (
    "NNODES", "GPUS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CHECKPOINT", "DATA", "VALID_DATA",
    "OUT", "TP", "PP", "VPP", "RECIPE", "EXTRA_ARGS",
    "HEALTH_CHECK", "DEVICE", "MIN_FREE_GIB", "MIN_BUS_GBS",
    "PYTHON", "HOSTS", "EXAMPLE", "LAUNCHER", "DRY_RUN",
)  # fmt: skip


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCH_VARIABLES and not name.startswith("SLURM_")
    }
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(
        command, env=clean | variables, capture_output=True, text=True, timeout=60, cwd=ROOT
    )


@pytest.fixture
def prepared(tmp_path: Path) -> dict[str, str]:
    """Variables of a run whose checkpoint and store are there, as far as the scripts look."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "data_train.idx").touch()
    return {
        "CHECKPOINT": str(tmp_path / "checkpoint"),
        "DATA": str(tmp_path / "data_train"),
        "OUT": str(tmp_path / "run of mine"),
        "PYTHON": "/env/bin/python",
    }


def tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found is not None, f"{name} is in the dev extra"
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    command = [
        tool("shellcheck"),
        "--severity=warning",
        "--external-sources",
        "--source-path=SCRIPTDIR",
        script,
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_every_script_is_checked() -> None:
    assert {"examples/pretrain_usdm.sh", "examples/cluster/slurm.sbatch", "scripts/launch.sh"} <= set(SCRIPTS)


def test_hadolint() -> None:
    command = [tool("hadolint"), "--failure-threshold", "warning", "docker/Dockerfile"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


# ── Kubernetes ──


def jobset() -> Any:
    return yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())


def test_jobset_schema() -> None:
    import jsonschema

    schema = json.loads((ROOT / "tests/golden/jobset_v1alpha2.schema.json").read_text())
    jsonschema.validate(jobset(), schema)
    wrong = jobset()
    del wrong["spec"]["failurePolicy"]["rules"][0]["name"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_pod_schema() -> None:
    import kubernetes_validate

    (replicated,) = jobset()["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "nodes"}, **replicated["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_pods_agree_with_each_other() -> None:
    """What the schema cannot know: node count, names, and that the variables start a run of the example."""
    document = jobset()
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(env["NNODES"]) == job["completions"] == job["parallelism"]
    name = document["metadata"]["name"]
    assert env["MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == env["GPUS_PER_NODE"]
    assert container["ports"][0]["containerPort"] == int(env["MASTER_PORT"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2] and rule["onExitCodes"]["containerName"] == container["name"]
    result = run("examples/pretrain_usdm.sh", **env, NODE_RANK="5", DRY_RUN="1")
    assert result.returncode == 2 and "there is no checkpoint at CHECKPOINT=/shared" in result.stderr


# ── signals ──


def test_a_signal_before_the_ranks_ends_what_runs_then(tmp_path: Path) -> None:
    """The check of the configuration reads every byte of a checkpoint: it must not go on alone."""
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\necho $$ > "$OUT/pid.new"; mv "$OUT/pid.new" "$OUT/pid"\nexec sleep 60\n'
    )
    python.chmod(0o755)
    script = "source scripts/launch.sh; launch_training pretrain; exit $?"
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path), "NNODES": "1"}
    with subprocess.Popen(["bash", "-c", script], env=environment, cwd=ROOT) as process:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ── dry runs ──


def test_torchrun_dry_run(prepared: dict[str, str]) -> None:
    result = run(
        "examples/cluster/torchrun.sh", "--dry-run", **prepared, HOSTS="n0 n1 n2", NCCL_IB_HCA="mlx5_0"
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["n0", "n1", "n2"]
    for rank, line in enumerate(lines):
        command = line.partition(": ")[2].replace("exec env", "exec env DRY_RUN=1")
        there = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
        )
        assert there.returncode == 0, there.stderr
        assert there.stdout.startswith(
            "/env/bin/python -m torch.distributed.run --nnodes 3 --nproc-per-node 8 "
            f"--node-rank {rank} --master-addr n0 --master-port 29500 -m usdm_megatron.cli pretrain "
        )
        assert "NCCL_IB_HCA=mlx5_0" in command


def test_slurm_dry_run(prepared: dict[str, str]) -> None:
    result = run("examples/cluster/slurm.sbatch", "--dry-run", **prepared, NNODES="4", TP="4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "env MASTER_PORT=29500 srun --nodes 4 --ntasks 32 --ntasks-per-node 8 --kill-on-bad-exit=1 "
        "/env/bin/python "
        "-m usdm_megatron.cli pretrain "
    )
    assert "--tensor-model-parallel-size 4" in result.stdout


def test_the_recommended_layout_is_started(prepared: dict[str, str]) -> None:
    """TP2 x PP2 x VPP8 of docs/scaling.md, by whatever way, with the planner's own flags."""
    from tests.plan_floor.requests import planned, request
    from usdm_megatron.plan.search import short_name

    (replicated,) = jobset()["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    found = planned(request(), tp=2, pp=2, vpp=8)
    assert short_name(found.planned.parallel, "none") == "tp=2,pp=2,vpp=8,recompute=none"
    flags = [
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        "--num-virtual-stages-per-pipeline-rank 8",
        "--use-tp-pp-dp-mapping",
        "--sequence-parallel",
        "--overlap-grad-reduce --overlap-param-gather",
    ]
    assert found.planned.parallel.use_tp_pp_dp_mapping and found.planned.parallel.sequence_parallel
    here = {"NODE_RANK": "0", "DRY_RUN": "1"}
    for result in (
        run("examples/pretrain_usdm.sh", **env | prepared | here | {"VALID_DATA": ""}),
        run("examples/pretrain_usdm.sh", **prepared | here, NNODES="64", MASTER_ADDR="a"),
        run("examples/cluster/slurm.sbatch", "--dry-run", **prepared),
    ):
        assert result.returncode == 0, result.stderr
        assert all(flag in result.stdout for flag in flags), result.stdout
    result = run("examples/pretrain_usdm.sh", **prepared | here, NNODES="64", MASTER_ADDR="a", TP="8", PP="4")
    assert "--use-tp-pp-dp-mapping" not in result.stdout  # a pipeline of 32 ranks does not fit into a node


def test_directives_agree_with_the_script() -> None:
    text = (CLUSTER / "slurm.sbatch").read_text()
    flags = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH --")
    )
    assert flags["ntasks-per-node"] == flags["gpus-per-node"] == "8"
    assert "requeue" in flags and flags["signal"].startswith(
        "TERM@"
    )  # to the ranks, not the batch shell (B:)


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("torchrun.sh", (), {}, "HOSTS is not set"),
        ("torchrun.sh", (), {"HOSTS": "a b"}, "OUT is not set"),
        ("torchrun.sh", ("--help",), {}, "--help is no argument"),
        ("slurm.sbatch", (), {}, "this is no Slurm job"),
        ("slurm.sbatch", ("64",), {}, "64 is no argument"),
        ("slurm.sbatch", ("--dry-run",), {"NNODES": "2"}, "CHECKPOINT is not set"),
    ],
)
def test_refusals(script: str, arguments: tuple[str, ...], variables: dict[str, str], message: str) -> None:
    result = run(f"examples/cluster/{script}", *arguments, **variables)
    assert result.returncode == 2
    assert message in result.stderr


def test_an_unknown_launcher(prepared: dict[str, str]) -> None:
    result = run(
        "examples/pretrain_usdm.sh", **prepared, NNODES="2", LAUNCHER="mpirun", MASTER_ADDR="a", NODE_RANK="0"
    )
    assert result.returncode == 2 and "LAUNCHER is mpirun" in result.stderr
