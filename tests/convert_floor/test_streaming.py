"""Conversion at work: bounded memory, interruptions, room on the disk, two at once, dry runs, the card."""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert_floor.conftest import edit_json
from usdm_megatron.checkpoint.integrity import verify_integrity
from usdm_megatron.checkpoint.store import load_full_tensors, save_checkpoint, single_process_group
from usdm_megatron.checkpoint.tensor_reader import TensorReader
from usdm_megatron.convert import destination
from usdm_megatron.convert.export_hf import dry_run as dry_export
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.hf_source import open_source
from usdm_megatron.convert.import_hf import dry_run, run_import
from usdm_megatron.convert.import_plan import plan_import, streamed_tensors
from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.errors import ConversionError
from usdm_megatron.vocab import Vocabulary

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_hf_checkpoint.py"


def convert(source: Path, work: Path, **options: Any) -> Path:
    run_import(ImportOptions(hf_path=str(source), save=work / "ck", **options))
    run_export(ExportOptions(load=work / "ck", hf_path=work / "hf"))
    return work / "hf"


# ── what is written ──


def test_the_files_are_those_that_cores_planner_writes(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    options = ImportOptions(hf_path=str(small_model()), save=tmp_path / "ours", workers=1)
    run_import(options)
    plan = plan_import(open_source(Path(options.hf_path)), options)
    state = {}
    for tensor in streamed_tensors(plan):
        offsets = () if tensor.layer is None else ((0, tensor.layer, tensor.layers),)
        state[f"{tensor.key}.{tensor.layer}"] = ShardedTensor.from_rank_offsets(
            tensor.key, tensor.make().clone(), *offsets, prepend_axis_num=len(offsets)
        )
    with single_process_group():
        save_checkpoint(tmp_path / "cores", "release", {"model": state}, {"iteration": 0})
    ours, cores = (TensorReader(tmp_path / name / "release") for name in ("ours", "cores"))
    assert ours.tensors == cores.tensors and len(ours.tensors) == 9
    for key in ours.tensors:
        assert torch.equal(ours.read(key), cores.read(key)), key
    formats = [
        json.loads((tmp_path / name / "release/metadata.json").read_text()) for name in ("ours", "cores")
    ]
    assert formats[0] == formats[1]


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_divide_the_files_and_change_no_weight(
    small_model: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    source = small_model()
    for name, count in (("one", 1), ("many", workers)):
        run_import(ImportOptions(hf_path=str(source), save=tmp_path / name, workers=count))
    one, many = tmp_path / "one/release", tmp_path / "many/release"
    sizes = [path.stat().st_size for path in many.glob("*.distcp")]
    assert len(sizes) == workers and len(list(one.glob("*.distcp"))) == 1
    keys = TensorReader(one).tensors.keys()
    found = load_full_tensors(many, keys)
    for key, value in load_full_tensors(one, keys).items():
        assert torch.equal(found[key], value), key


def test_the_source_s_generation_config_comes_back(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()
    edit_json(source / "generation_config.json", temperature=0.7, eos_token_id=[2, 5], do_sample=True)
    found = json.loads((convert(source, tmp_path) / "generation_config.json").read_text())
    assert (found["temperature"], found["eos_token_id"], found["bos_token_id"]) == (0.7, [2, 5], 1)


def test_the_card_says_where_the_weights_come_from(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert (
        "| source | tiny-mistral |" in card
        and "| `<pad>` | 42002 |" in card
        and "| `<\\|continue\\|>` | 32000 |" in card
    )
    assert "| sha256 of model.safetensors | " in card and str(exported) not in card


def test_the_export_carries_hashes_and_the_import_believes_them(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    exported = convert(small_model(), tmp_path)
    assert verify_integrity(exported) == []
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (exported / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match=r"model\.safetensors differs from what integrity\.json"):
        run_import(ImportOptions(hf_path=str(exported), save=tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_the_same_greedy_tokens(small_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = small_model()
    prompt = torch.randint(3, 77, (3, 9), generator=torch.Generator().manual_seed(1))
    said = [
        AutoModelForCausalLM.from_pretrained(path)
        .eval()
        .generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        for path in (source, convert(source, tmp_path))
    ]
    assert said[0].shape[1] > 9 and torch.equal(said[0], said[1])


def test_two_exports_are_equal_bytes(extended: Path, exported: Path, tmp_path: Path) -> None:
    run_export(ExportOptions(load=extended, hf_path=tmp_path / "again", workers=1))
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir()) and len(names) > 5
    for name in names:
        assert filecmp.cmp(exported / name, tmp_path / "again" / name, shallow=False), name


def test_units_and_tokens_of_ones_own(plain_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    options = {"extend_vocab": "units=20,tokens=<|user|>,<|agent|>", "seed": 3}
    exported = convert(plain_model, tmp_path, **options)
    vocabulary = Vocabulary(unit_count=20, extra_tokens=("<|user|>", "<|agent|>"))
    assert vocabulary.size == 32_025
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == 32_025
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.convert_tokens_to_ids(["<|unit19|>", "<pad>", "<|user|>", "<|agent|>"]) == [
        32_021,
        32_022,
        32_023,
        32_024,
    ]
    again = run_import(ImportOptions(hf_path=str(exported), save=tmp_path / "again", **options))
    assert again.vocabulary == vocabulary and again.new_rows == 0
    with pytest.raises(ConversionError, match="partially extended: 20 speech units and 2 extra tokens"):
        run_import(ImportOptions(hf_path=str(exported), save=tmp_path / "usdm", extend_vocab="usdm"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "units",
        "units=0",
        "units=-1",
        "units=2,tokens=",
        "units=2,tokens=a,a",
        "units=2,tokens=<pad>",
        "all",
    ],
)
def test_other_extensions_are_refused(text: str) -> None:
    with pytest.raises(ConversionError, match="--extend-vocab"):
        ImportOptions(hf_path="a", save=Path("b"), extend_vocab=text)


def test_a_token_that_is_there_already_is_refused_before_anything(plain_model: Path, tmp_path: Path) -> None:
    options = ImportOptions(
        hf_path=str(plain_model), save=tmp_path / "ck", extend_vocab="units=5,tokens=foo,<x>"
    )
    with pytest.raises(ConversionError, match="--extend-vocab: foo is token 8014 of the source already"):
        dry_run(options)


def test_flags_of_the_other_mode_are_refused() -> None:
    options: dict[str, Any] = {"hf_path": "a", "load": Path("b"), "mode": "weights"}
    VerifyOptions(**options)
    with pytest.raises(ConversionError) as refused:
        VerifyOptions(**options, json=Path("c"), tolerance=1.0)
    assert [problem.split()[0] for problem in refused.value.problems] == ["--tolerance", "--json"]


# ── before anything is written ──


def test_dry_runs_list_every_tensor_and_write_nothing(
    plain_model: Path, extended: Path, tmp_path: Path
) -> None:
    listed = dry_run(ImportOptions(hf_path=str(plain_model), save=tmp_path / "ck", extend_vocab="usdm"))
    assert "embedding.word_embeddings.weight [42496, 8], rows padded with zeros" in listed
    assert "model.layers.{layer}.self_attn.k_proj.weight [20, 8]" in listed
    assert "decoder.layers.self_attention.linear_qkv.weight [100, 8] x 3 layers, per query group" in listed
    assert "new rows: ids 32,000 to 42,002" in listed
    listed = dry_export(ExportOptions(load=extended, hf_path=tmp_path / "hf", max_shard_size="200KB"))
    assert "lm_head.weight [42003, 8]" in listed and "model-00003-of-" in listed
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_first(
    plain_model: Path, extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match="0.00 GB are free, 0.07 GB are needed"):
        run_import(ImportOptions(hf_path=str(plain_model), save=tmp_path / "deep" / "ck"))
    with pytest.raises(ConversionError, match="GB are needed"):
        run_export(ExportOptions(load=extended, hf_path=tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = str(small_model())
    with destination.claimed(tmp_path / "ck"), pytest.raises(ConversionError, match="another conversion"):
        run_import(ImportOptions(hf_path=source, save=tmp_path / "ck"))
    run_import(ImportOptions(hf_path=source, save=tmp_path / "ck"))
    busy = tmp_path / ("hf.tmp-" + "0" * 32)
    with destination.claimed(busy), pytest.raises(ConversionError, match="another export"):
        run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf"))
    assert run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf")).removed == (busy.name,)


def test_every_tensor_that_is_not_finite_is_named(small_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = small_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :2] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError) as refused:
        run_import(ImportOptions(hf_path=str(source), save=tmp_path / "ck"))
    assert [problem.split(": ", 1)[1] for problem in refused.value.problems] == [
        "model.layers.1.mlp.up_proj.weight has 2 values that are NaN or infinite",
        "model.norm.weight has 1 values that are NaN or infinite",
    ]
    assert not (tmp_path / "ck").exists()


# ── interrupted ──


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 140 MB: long enough at work to be killed there."""
    from tests.convert_floor.conftest import write_hf_model

    return write_hf_model(
        tmp_path_factory.mktemp("larger") / "hf",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=9,
        vocab_size=2000,
    )


def kill_at_work(arguments: list[str], seen: Path, pattern: str, delay_s: float) -> int:
    """Start the tool, wait for its temporary directory and `delay_s` more, kill -9; the exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments], env=environment)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(seen.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_import_leaves_nothing_or_everything(larger_model: Path, tmp_path: Path, seed: int) -> None:
    root = tmp_path / "ck"
    delay_s = random.Random(seed).uniform(0, 0.6)
    code = kill_at_work(
        ["import", "--hf-path", str(larger_model), "--save", str(root)], root, "release.tmp-*", delay_s
    )
    complete = (root / "release").exists()
    assert code == -signal.SIGKILL or (code == 0 and complete)  # it did not end otherwise
    if complete:
        assert verify_integrity(root / "release") == []
    left = sorted(path.name for path in root.glob("*.tmp-*"))
    summary = run_import(ImportOptions(hf_path=str(larger_model), save=root, overwrite=complete))
    assert list(summary.removed) == left
    assert sorted(path.name for path in root.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    run_import(ImportOptions(hf_path=str(larger_model), save=tmp_path / "undisturbed"))
    for path in (tmp_path / "undisturbed/release").iterdir():
        assert filecmp.cmp(path, root / "release" / path.name, shallow=False), path.name


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_export_leaves_nothing_or_everything(larger_model: Path, tmp_path: Path, seed: int) -> None:
    run_import(ImportOptions(hf_path=str(larger_model), save=tmp_path / "ck"))
    target = tmp_path / "out" / "hf"
    delay_s = random.Random(seed).uniform(0, 0.4)
    arguments = [
        "export",
        "--load",
        str(tmp_path / "ck"),
        "--hf-path",
        str(target),
        "--max-shard-size",
        "30MB",
    ]
    code = kill_at_work(arguments, target.parent, "hf.tmp-*", delay_s)
    complete = target.exists()
    assert code == -signal.SIGKILL or (code == 0 and complete)
    if complete:
        assert verify_integrity(target) == []
    left = [path.name for path in target.parent.glob("*.tmp-*")]
    options = ExportOptions(load=tmp_path / "ck", hf_path=target, overwrite=complete)
    assert list(run_export(options).removed) == left
    assert [path.name for path in target.parent.iterdir()] == ["hf"] and verify_integrity(target) == []


# ── memory ──

_PEAK = """
import sys, threading, time
from pathlib import Path
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
import torch.distributed.checkpoint, transformers

def anonymous_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

before, peak, done = anonymous_mb(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_mb())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
source, work = Path(sys.argv[1]), Path(sys.argv[2])
run_import(ImportOptions(hf_path=str(source), save=work / "ck"))
run_export(ExportOptions(load=work / "ck", hf_path=work / "hf"))
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_layers(small_model: Callable[..., Path], tmp_path: Path) -> None:
    peaks_mb = []
    for layers in (2, 12):
        source = small_model(
            f"{layers}", num_hidden_layers=layers, hidden_size=640, intermediate_size=3200, vocab_size=1000
        )
        weights_mb = (source / "model.safetensors").stat().st_size / 2**20
        command = [sys.executable, "-W", "ignore", "-c", _PEAK, str(source), str(tmp_path / f"work{layers}")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(TOOL.parents[1]),
            # glibc keeps freed blocks of up to 32 MB; the tensors here are smaller, those of a 7B are not
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        peaks_mb.append(float(ran.stdout))
    assert weights_mb > 290  # ten layers more are 240 MB
    assert peaks_mb[1] < peaks_mb[0] + 40, peaks_mb
