"""Wrong input of `usdm-megatron pretrain`: one clear message (field, value, rule, remedy), exit code 2.

Everything here runs in this process: `--dry-run` checks all that a run checks before its ranks start.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import Layout
from usdm_megatron.checkpoint.integrity import write_integrity
from usdm_megatron.cli import main
from usdm_megatron.vocab import Vocabulary

ROWS = 20
Refused = Callable[..., str]


class World(NamedTuple):
    """A model, its data, a run of five steps with three checkpoints, and broken variants of each."""

    directory: Path
    checkpoint: Path  # converted model
    run: Path

    def __getitem__(self, name: Any) -> str:
        return str(self.directory / name)


@pytest.fixture(scope="module")
def world(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("bad")
    (directory / "empty").mkdir()
    (directory / "file").write_text("not a directory")
    tiny.write_store(directory / "rows", tiny.random_rows(ROWS, 64, seed=1))
    tiny.write_store(directory / "other_rows", tiny.random_rows(ROWS, 64, seed=2))
    more_ids = Vocabulary(text_size=300, unit_count=200)
    tiny.write_store(directory / "more_ids", [*tiny.random_rows(3, 64), [[1, 501, 2]]], more_ids)
    same_size = Vocabulary(text_size=200, unit_count=200)
    assert same_size.size == tiny.VOCABULARY.size
    tiny.write_store(directory / "other_ids", tiny.random_rows(3, 64, vocabulary=same_size), same_size)
    tiny.write_store(directory / "truncated", tiny.random_rows(3, 64))
    content = (directory / "truncated.bin").read_bytes()
    (directory / "truncated.bin").write_bytes(content[:-2])
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6}
    edit(shutil.copytree(tiny_model.root, directory / "six_heads") / "release", "hf_config.json", heads)
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with_tokenizer = shutil.copytree(tiny_model.root, directory / "with_tokenizer") / "release"
    shutil.copytree(directory / "tokenizer", with_tokenizer / "tokenizer")
    write_integrity(with_tokenizer)
    made_with_another(tiny.write_store(directory / "other_tokenizer", tiny.random_rows(3, 64)))
    flip(next((shutil.copytree(tiny_model.root, directory / "damaged") / "release").glob("*.distcp")))
    config = jobs.run_config(
        Layout(),
        data={"train_data_path": (str(directory / "rows"),)},
        checkpoint={
            "save": str(directory / "run"),
            "pretrained_checkpoint": str(tiny_model.root),
            "save_interval": 2,
        },
    )
    assert run_ranks(1, jobs.train, config)[0]["code"] == 0
    return World(directory, tiny_model.root, directory / "run")


def edit(checkpoint: Path, file: str, changes: dict[str, Any]) -> None:
    """Change fields of a JSON file of a checkpoint, and its checksums with them."""
    record = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps({**record, **changes}))
    write_integrity(checkpoint)


def made_with_another(store: Path) -> None:
    record = json.loads(Path(f"{store}.json").read_text())
    Path(f"{store}.json").write_text(json.dumps({**record, "tokenizer_sha256": "ab" * 32}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Refused:
    """Call with flags (None drops one of the good ones, True is a switch): the message of the refusal."""
    monkeypatch.setenv("COLUMNS", "1000")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)

    def call(changes: dict[str, Any], code: int = 2) -> str:
        flags = {
            "--train-data-path": "{rows}",
            "--pretrained-checkpoint": str(world.checkpoint),
            "--save": str(tmp_path / "run"),
            "--seq-length": 64,
            "--global-batch-size": 4,
            "--dry-run": True,
            **changes,
        }
        arguments = []
        for flag, value in flags.items():
            if value is not None:
                arguments += [flag] if value is True else [flag, str(value).format_map(world)]
        try:
            result = main(["pretrain", *arguments])
        except SystemExit as stop:  # tyro's own refusals
            result = stop.code
        output = capsys.readouterr()
        assert result == code, output.err
        assert "Traceback" not in output.out + output.err
        assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"
        assert output.err.strip() if code else not output.err
        return output.out + output.err

    return call


TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
VPP = "--num-virtual-stages-per-pipeline-rank"
WEIGHTS = "--pretrained-checkpoint"
# what is wrong → (flags, what the message must say)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # missing or empty paths
    "no train data": (
        {"--train-data-path": None},
        ("data: --train-data-path is missing", "tools/preprocess_data.py"),
    ),
    "store that is not there": (
        {"--train-data-path": "{nowhere}"},
        ("nowhere: no token store, nowhere.bin, nowhere.idx, nowhere.json not found", "--output-prefix"),
    ),
    "store named with .bin": (
        {"--train-data-path": "{rows}.bin"},
        ("rows.bin.bin", "a store is named by its prefix, without .bin"),
    ),
    "validation store that is not there": ({"--valid-data-path": "{nowhere}"}, ("nowhere: no token store",)),
    "empty string as a path": (
        {"--train-data-path": "", "--save": " "},
        (
            "data: train_data_path is empty; give a value or drop --train-data-path",
            "checkpoint: save is empty",
        ),
    ),
    "no --save": ({"--save": None}, ("checkpoint: --save is missing; name the run directory",)),
    "no weights": (
        {WEIGHTS: None},
        (
            "there are no weights to start from",
            "--pretrained-checkpoint CK",
            "convert_hf_checkpoint.py import",
        ),
    ),
    "weights that are not there": (
        {WEIGHTS: "{nowhere}"},
        ("--pretrained-checkpoint", "nowhere is not a directory", "convert_hf_checkpoint.py import"),
    ),
    "weights in an empty directory": (
        {WEIGHTS: "{empty}"},
        ("--pretrained-checkpoint", "empty holds no checkpoint", "name a run or a converted model"),
    ),
    # layout
    "world size that the layout does not divide": (
        {TP: 2, "--world-size": 3},
        ("parallel: tp=2 x pp=1 = 2 does not divide world size 3; launch 2, 4, 6", TP),
    ),
    "world size of the local launch": ({TP: 2, "--nproc-per-node": 3, "--dry-run": None}, ("world size 3",)),
    "world size 0": ({"--world-size": 0}, ("--world-size is 0; it must be at least 1",)),
    "--nproc-per-node -1": ({"--nproc-per-node": -1}, ("--nproc-per-node is -1; it must be at least 1",)),
    "--world-size without --dry-run": (
        {"--world-size": 2, "--dry-run": None},
        ("--world-size is for --dry-run", "--nproc-per-node"),
    ),
    "tp that does not divide query groups": (
        {TP: 4, "--world-size": 4},
        (
            "parallel: tp=4 does not divide the model's 2 query groups (key-value heads);",
            f"set {TP} to a divisor",
        ),
    ),
    "tp that divides nothing": (
        {TP: 3, "--world-size": 3},
        (
            "tp=3 does not divide the model's 4 attention heads",
            "tp=3 does not divide the model's 2 query groups",
            "tp=3 does not divide the model's 512 padded vocabulary rows",
        ),
    ),
    "tp that does not divide the padded vocabulary": (
        {TP: 6, "--world-size": 6, WEIGHTS: "{six_heads}"},
        (
            "error: parallel: tp=6 does not divide the model's 512 padded vocabulary rows;",
            f"set {TP} to a divisor",
        ),
    ),
    "odd micro-batch x sequence under sequence parallel": (
        {TP: 2, "--sequence-parallel": True, "--seq-length": 63, "--micro-batch-size": 3, "--world-size": 2},
        (
            "micro batch size x seq length = 189 does not divide over tp=2",
            "set --seq-length to a multiple of 2",
        ),
    ),
    "sequence parallel without tensor parallel": ({"--sequence-parallel": True}, ("drop it or set " + TP,)),
    "pipeline deeper than the model": (
        {PP: 12, "--world-size": 12},
        ("12 pipeline chunks (pp=12 x vpp=1) do not divide the model's 6 layers", PP),
    ),
    "pipeline that does not divide the layers": (
        {PP: 4, "--world-size": 4},
        ("4 pipeline chunks (pp=4 x vpp=1) do not divide the model's 6 layers", PP),
    ),
    "virtual stages that do not divide the layers": (
        {PP: 2, VPP: 2, "--world-size": 2},
        ("4 pipeline chunks (pp=2 x vpp=2) do not divide the model's 6 layers",),
    ),
    "virtual stages of 2 without overlapped p2p": (
        {PP: 2, VPP: 3, "--world-size": 2, "--no-overlap-p2p-communication": True},
        ("interleaved pipeline of 2 stages gives a wrong loss", "drop --no-overlap-p2p-communication"),
    ),
    "virtual stages without a pipeline": ({VPP: 2}, ("virtual stages need a pipeline; set " + PP,)),
    "virtual stages and odd micro-batches": (
        {PP: 2, VPP: 3, "--world-size": 2, "--global-batch-size": 3},
        ("an interleaved pipeline needs the 3 micro-batches of a step to be a multiple of pp=2",),
    ),
    "global batch that does not divide": (
        {"--global-batch-size": 5, "--micro-batch-size": 2, "--world-size": 2},
        (
            "data: global batch size 5 is not divisible by micro batch size 2 x data parallel size 2 = 4",
            "set --global-batch-size to a multiple of 4",
        ),
    ),
    "recompute more layers than a chunk has": (
        {PP: 3, "--world-size": 3, "--recompute-granularity": "full", "--recompute-num-layers": 3},
        ("parallel: recompute_num_layers 3 exceeds the 2 layers of a pipeline chunk; lower it",),
    ),
    "uniform groups that do not divide a chunk": (
        {
            PP: 2,
            "--world-size": 2,
            "--decoder-first-pipeline-num-layers": 2,
            "--recompute-granularity": "full",
            "--recompute-num-layers": 4,
        },
        (
            "recompute_num_layers 4 does not divide the 2 layers of a pipeline chunk",
            "--recompute-method block",
        ),
    ),
    "layernorm recompute without Transformer Engine": (
        {"--recompute-granularity": "selective", "--recompute-modules": "layernorm"},
        ("recompute module layernorm needs transformer-engine", "drop it from --recompute-modules"),
    ),
    "first stage that leaves too little": (
        {PP: 3, "--world-size": 3, "--decoder-first-pipeline-num-layers": 5},
        (
            "5 in the first stage leave 1 of the model's 6 layers to 2 other stages",
            "--pipeline-model-parallel-l",
        ),
    ),
    "pipeline layout of another model": (
        {PP: 2, "--world-size": 2, "--pipeline-model-parallel-layout": "Et*4|t*4L"},
        ("'Et*4|t*4L' holds 8 layers and the model has 6; it must hold them all",),
    ),
    "adapters on a stage without layers": (
        {
            PP: 3,
            "--world-size": 3,
            "--pipeline-model-parallel-layout": "E|t*5|tL",
            "--lora": True,
            "--no-train-new-embeddings": True,
        },
        ("lora: stage 0 of --pipeline-model-parallel-layout E|t*5|tL holds no layer", "give every stage one"),
    ),
    "precision-aware optimizer without CUDA": (
        {"--bf16": True, "--use-precision-aware-optimizer": True, "--optimizer-cpu-offload": True},
        (
            "--use-precision-aware-optimizer (with --optimizer-cpu-offload) needs CUDA and transformer-",
            "there is no CUDA here; drop it",
        ),
    ),
    "te without CUDA": (
        {"--core-attention": "te"},
        ("model: core_attention te cannot run: it needs CUDA and there is none; use --core-attention auto",),
    ),
    "flash without CUDA": ({"--core-attention": "flash"}, ("core_attention flash cannot run", "auto")),
    # data against model
    "sequence longer than the model's positions": (
        {"--seq-length": 1024},
        (
            "data: seq_length 1024 exceeds the model's 512 positions (max_position_embeddings);",
            "lower --seq-length",
        ),
    ),
    "row longer than --seq-length": (
        {"--seq-length": 32},
        ("rows: its longest row holds", "more than --seq-length 32; train with --seq-length"),
    ),
    "ids beyond the vocabulary": (
        {"--train-data-path": "{more_ids}"},
        ("more_ids: its largest id is 501, the model's vocabulary has 403 ids", "--extend-vocab usdm"),
    ),
    "ids beyond the vocabulary in the validation store": (
        {"--valid-data-path": "{more_ids}"},
        ("more_ids: its largest id is 501",),
    ),
    "store of another vocabulary of the same size": (
        {"--train-data-path": "{other_ids}"},
        (
            "'text_size': 200",
            "'text_size': 300",
            "the same ids would mean other tokens: preprocess for this model",
        ),
    ),
    "store of another tokenizer": (
        {"--train-data-path": "{other_tokenizer}", WEIGHTS: "{with_tokenizer}"},
        ("was made with another tokenizer (sha256 abababababab…) than the checkpoint's (", "preprocess with"),
    ),
    "truncated .bin": (
        {"--train-data-path": "{truncated}"},
        ("truncated.bin: ", "truncated, or from another store", "copy it again"),
    ),
    "several of these at once": (
        {TP: 4, "--world-size": 4, "--seq-length": 1024, "--train-data-path": "{other_ids}"},
        ("query groups", "positions", "other tokens"),
    ),
    "damaged weights": ({WEIGHTS: "{damaged}"}, ("damaged/release", ".distcp")),
    # durations
    "more steps than rows": (
        {"--train-iters": 6},
        (
            "training: --train-iters 6 x --global-batch-size 4 needs more rows than the 20",
            "--num-train-epochs E",
        ),
    ),
    "more samples than rows": ({"--train-samples": 21}, ("--train-samples 21 needs more rows than the 20",)),
    "two durations": (
        {"--train-iters": 2, "--train-samples": 8},
        ("training: train_iters and train_samples are given together; keep exactly one",),
    ),
    "negative seed": ({"--seed": -1}, ("seed is -1, the least is 0",)),
    # flags
    "unknown flag": (
        {"--trian-data-path": "x"},
        ("Unrecognized options: --trian-data-path", "--train-data-path"),
    ),
    "a flag's abbreviation": ({"--global-batch": 4}, ("--global-batch-size",)),
    "wrong type": ({"--lr": "fast"}, ("--lr", "fast")),
    "wrong choice": ({"--lr-decay-style": "cosin"}, ("--lr-decay-style", "cosine", "linear", "constant")),
    "wrong recipe": ({"--recipe": "original"}, ("--recipe is 'original'; it must be usdm or corrected",)),
    "nan": ({"--lr": "nan"}, ("optimizer: lr is nan; it must be a finite number",)),
    "several wrong values": (
        {"--lr": -1, "--micro-batch-size": 0, "--adam-beta2": 1.0, "--log-interval": 0},
        (
            "optimizer: lr is -1.0; it must not be negative",
            "data: micro_batch_size is 0; it must be at least 1",
            "optimizer: adam_beta2 is 1.0; it must be in [0, 1)",
            "logging: log_interval is 0; it must be at least 1",
        ),
    ),
    # --load
    "empty --load": (
        {"--load": "{empty}", WEIGHTS: None},
        ("checkpoint: --load", "empty holds no checkpoint; name weights to start from with " + WEIGHTS),
    ),
    "empty --load with --exit-on-missing-checkpoint": (
        {"--load": "{empty}", "--exit-on-missing-checkpoint": True},
        ("empty holds no checkpoint; drop --exit-on-missing-checkpoint to start afresh",),
    ),
    "empty --load with --exit-on-missing-checkpoint and no weights": (
        {"--load": "{nowhere}", "--exit-on-missing-checkpoint": True, WEIGHTS: None},
        ("nowhere holds no checkpoint", WEIGHTS),
    ),
    # --save
    "--save holds another run": (
        {"--save": "{run}"},
        ("run holds another run; name a fresh directory, or continue that run with --load",),
    ),
    "--save holds a converted model": (
        {"--save": "{with_tokenizer}"},
        ("with_tokenizer holds a converted model; name another directory",),
    ),
    "--save is a file": ({"--save": "{file}"}, ("file is a file; name a directory",)),
    "--save below a file": ({"--save": "{file}/run/a"}, ("file is a file; name a directory",)),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, refused: Refused) -> None:
    changes, says = CASES[case]
    message = refused(changes)
    for part in says:
        assert part in message


def test_good_flags_are_accepted(refused: Refused) -> None:
    """The flags that every case above changes are good ones, so each refusal is about the change."""
    report = refused({}, code=0)
    assert "dry run: everything is in order" in report
    assert "steps       5, each 4 rows in 4 micro-batches a rank" in report


def test_an_empty_load_starts_from_the_weights(world: World, refused: Refused) -> None:
    assert f"start       {world.checkpoint}/release at step 0" in refused({"--load": "{nowhere}"}, code=0)


CONTINUE = {"--load": "{run}", "--save": "{run}"}
RESUME_CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lr": (
        {"--lr": 2e-3},
        ("resume: optimizer.lr was 0.001 in", "and is 0.002 now; keep it, or start", WEIGHTS),
    ),
    "warm-up": ({"--lr-warmup-iters": 2}, ("resume: optimizer.lr_warmup_iters was None in", "is 2 now")),
    "sequence length": ({"--seq-length": 128}, ("resume: data.seq_length was 64 in", "is 128 now")),
    "global batch": ({"--global-batch-size": 2}, ("resume: data.global_batch_size was 4 in", "is 2 now")),
    "precision": ({"--bf16": True}, ("resume: training.bf16 was False in", "is True now")),
    "order": ({"--shuffle": True}, ("resume: data.shuffle was False in",)),
    "recipe": (
        {"--recipe": "usdm"},
        (
            "resume: optimizer.decay_norms was False in",
            "resume: optimizer.clip_grad was 1.0 in",
            "resume: training.train_sample_boundaries was False in",
            "resume: training.loss_reduction was 'token-mean' in",
        ),
    ),
    "several": ({"--lr": 2e-3, "--seed": 7}, ("optimizer.lr was 0.001", "training.seed was 42")),
    "another store": (
        {"--train-data-path": "{other_rows}"},
        ("run/iter_0000005 was trained on another token store than", "other_rows; give that one", WEIGHTS),
    ),
    "fewer steps than done": (
        {"--train-iters": 3},
        ("has completed 5 steps, more than the 3 asked for; raise --train-iters",),
    ),
    "a step that is not there": (
        {"--ckpt-step": 3, WEIGHTS: None},
        ("--ckpt-step 3: ", "iter_0000003 does not exist (steps there: 2, 4, 5)"),
    ),
    "best of a run without it": (
        {"--ckpt-step": "best", WEIGHTS: None},
        ("--ckpt-step best", "train with --keep-best"),
    ),
}


@pytest.mark.parametrize("case", RESUME_CASES)
def test_resume_refused(case: str, refused: Refused) -> None:
    changes, says = RESUME_CASES[case]
    message = refused({**CONTINUE, "--lr": 1e-3, **changes})
    for part in says:
        assert part in message
    assert len(message.splitlines()) == {"recipe": 4, "several": 2}.get(case, 1), (
        "one line a problem, no more"
    )


FREE = {
    "--micro-batch-size": 2,
    "--eval-interval": 7,
    "--save-interval": 1,
    "--log-interval": 3,
    PP: 2,
    TP: 2,
}


def test_layout_and_intervals_may_change_on_resume(refused: Refused) -> None:
    report = refused({**CONTINUE, "--lr": 1e-3, **FREE, "--world-size": 8}, code=0)
    assert "iter_0000005 at step 5" in report
    assert "8: tp=2 pp=2 vpp=1 dp=2" in report


def test_every_run_config_is_a_config_file_for_its_resume(world: World, refused: Refused) -> None:
    dropped = {"--train-data-path": None, "--seq-length": None, "--global-batch-size": None, WEIGHTS: None}
    report = refused({**dropped, **CONTINUE, "--config": "{run}/run_config.yaml"}, code=0)
    assert "iter_0000005 at step 5" in report


def test_chosen_step_of_a_run_that_is_damaged(world: World, refused: Refused) -> None:
    """An explicit choice is taken or refused; without one the resume goes back to a whole one."""
    damaged = world.directory / "damaged_run"
    shutil.copytree(world.run, damaged)
    flip(next((damaged / "iter_0000005").glob("*.distcp")))
    flags = {"--load": str(damaged), "--save": str(damaged), "--lr": 1e-3}
    message = refused({**flags, "--ckpt-step": 5, WEIGHTS: None})
    assert "iter_0000005" in message and ".distcp" in message and "(--ckpt-step 5)" in message
    assert "iter_0000004 at step 4" in refused(flags, code=0)
    for step in (2, 4):
        (damaged / f"iter_{step:07d}" / "common.pt").unlink()
    message = refused(flags)
    assert all(f"iter_000000{step}" in message for step in (2, 4, 5)) and "common.pt" in message


def test_run_of_another_task(world: World, refused: Refused) -> None:
    copy = shutil.copytree(world.run, world.directory / "sft_run")
    edit(copy / "iter_0000005", "train_state.json", {"task": "sft"})
    message = refused({"--load": str(copy), "--save": str(copy), "--lr": 1e-3})
    assert "is a sft run and this is pretrain; start from its weights with --pretrained-checkpoint" in message


def test_train_state_that_cannot_be_read(world: World, refused: Refused) -> None:
    copy = shutil.copytree(world.run, world.directory / "no_state")
    flags = {"--load": str(copy), "--save": str(copy), "--lr": 1e-3}
    edit(copy / "iter_0000005", "train_state.json", {"unknown": 1})
    assert "train_state.json cannot be read" in refused(flags)


def test_what_load_may_name(world: World, refused: Refused) -> None:
    """A converted model gives weights; a checkpoint of a run, or the run spelled otherwise, continues it."""
    assert f"{world.checkpoint}/release at step 0" in refused({"--load": str(world.checkpoint)}, code=0)
    flags = {"--lr": 1e-3}
    assert "iter_0000002 at step 2" in refused({**flags, "--load": "{run}/iter_0000002"}, code=0)
    assert "iter_0000002 at step 2" in refused(
        {**flags, "--load": "{run}", "--ckpt-step": 2, WEIGHTS: None}, code=0
    )
    spelled = {"--load": "{empty}/../run", "--save": "{run}"}
    assert "iter_0000005 at step 5" in refused({**flags, **spelled}, code=0)


def test_run_as_pretrained_checkpoint_gives_weights_only(refused: Refused) -> None:
    assert "iter_0000005 at step 0" in refused({WEIGHTS: "{run}", "--lr": 2e-3}, code=0)


def test_ckpt_step_beside_pretrained_checkpoint_is_one_of_its_steps(refused: Refused) -> None:
    """So the one command line that starts a run also restarts it, from the run's own newest checkpoint."""
    start = {WEIGHTS: "{run}", "--ckpt-step": 2, "--lr": 1e-3}
    assert "iter_0000002 at step 0" in refused({**start, "--load": "{nowhere}"}, code=0)
    assert "iter_0000005 at step 5" in refused({**start, "--load": "{run}", "--save": "{run}"}, code=0)
    message = refused({**start, "--ckpt-step": 3})
    assert "--ckpt-step 3: " in message and "(steps there: 2, 4, 5)" in message


def test_checkpoint_whose_vocabulary_is_not_its_models(
    world: World, tiny_model: Any, refused: Refused
) -> None:
    release = shutil.copytree(tiny_model.root, world.directory / "mixed") / "release"
    edit(release, "vocabulary.json", {"unit_count": 50})
    message = refused({WEIGHTS: "{mixed}"})
    assert "vocabulary.json has 353 ids, but hf_config.json says vocab_size = 403" in message


def test_weights_of_another_model_are_refused_by_their_shapes(
    world: World, tiny_model: Any, tmp_path: Path
) -> None:
    """`hf_config.json` of one model beside the tensors of another: found when the tensors are read."""
    config = jobs.run_config(
        Layout(2),
        data={"train_data_path": (world["rows"],)},
        checkpoint={"save": str(tmp_path / "run"), "pretrained_checkpoint": world["six_heads"]},
    )
    with pytest.raises(AssertionError, match="CheckpointError") as failure:
        run_ranks(2, jobs.train, config)
    assert "linear_qkv" in str(failure.value) or "linear_proj" in str(failure.value)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2


YAML_CASES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "unknown key": (
        {"data": {"seq_lenght": 64}},
        ("data.seq_lenght: unknown key; did you mean data.seq_length?",),
    ),
    "unknown section": ({"optimiser": {}}, ("optimiser: unknown key; did you mean optimizer?",)),
    "key of another section": ({"lr": 1e-3}, ("lr: unknown key",)),
    "wrong type": ({"data": {"seq_length": "64"}}, ("data.seq_length: is '64'; expected int",)),
    "fraction of a row": ({"data": {"micro_batch_size": 1.5}}, ("micro_batch_size: is 1.5; expected int",)),
    "yes for a number": ({"optimizer": {"lr": True}}, ("optimizer.lr: is True; expected float",)),
    "text for a number": ({"optimizer": {"lr": "fast"}}, ("optimizer.lr: is 'fast'; expected float",)),
    "wrong choice": (
        {"model": {"core_attention": "xla"}},
        ("core_attention: is 'xla'; expected auto, te, flash, torch",),
    ),
    "a section that is none": ({"data": 3}, ("data: is 3; it must be a section with fields",)),
    "a list": ([1, 2], ("holds a list; sections as in RunConfig are expected",)),
    "recipe": ({"recipe": "original"}, ("recipe: is 'original'; expected usdm, corrected",)),
    "several": (
        {"data": {"seq_lenght": 64, "shuffle": "yes"}, "optimizer": {"lr": []}, "loging": {}},
        (
            "data.seq_lenght",
            "data.shuffle: is 'yes'; expected bool",
            "optimizer.lr: is []",
            "did you mean logging?",
        ),
    ),
}


@pytest.mark.parametrize("case", YAML_CASES)
def test_config_file_refused(case: str, refused: Refused, tmp_path: Path) -> None:
    tree, says = YAML_CASES[case]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(tree))
    message = refused({"--config": path})
    for part in says:
        assert part in message
    assert message.count(f"error: --config {path}") == max(1, len(says))


def test_an_environment_that_is_not_deterministic(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    message = refused({"--deterministic-mode": True})
    assert "sets NVTE_ALLOW_NONDETERMINISTIC_ALGO=1; unset it, or set one of 0" in message
    assert "CUBLAS" not in message


def test_config_file_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    assert "cannot be read" in refused({"--config": tmp_path / "nowhere.yaml"})
    (tmp_path / "broken.yaml").write_text("data: [1,\n")
    assert "give a YAML file" in refused({"--config": tmp_path / "broken.yaml"})


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "unknown command; did you mean pretrain?" in capsys.readouterr().err
    assert main([]) == 2
