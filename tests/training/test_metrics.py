"""What a run writes down: `metrics.jsonl`, its numbers, which checkpoints stay; and how often it syncs."""

from __future__ import annotations

import collections
import dataclasses
import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import Layout
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import LoggingConfig
from usdm_megatron.data.batch import build_packed_batch
from usdm_megatron.data.order import EMPTY_ROW
from usdm_megatron.data.step_work import StepCounter, StepWork
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.train.metrics import FlopCounter, Reporter, forget_steps_after

KINDS = ("text", "unit", "continue", "correspond", "eos", "bos")
LOSSES = {"loss", *(f"loss_{kind}" for kind in KINDS)}
# as the architecture document lists them
TRAIN_FIELDS = LOSSES | {
    "kind", "step", "lr", "grad_norm", "tokens", "consumed_rows", "step_time_s", "tokens_per_s",
    "tflops_per_rank", "mfu", "memory_gib",
}  # fmt: skip
ACCURACIES = {"accuracy", *(f"accuracy_{kind}" for kind in KINDS)}
EVAL_FIELDS = LOSSES | ACCURACIES | {"kind", "step", "tokens", "rows"}
CHECKPOINT_FIELDS = {"kind", "step", "path", "stall_s", "bytes"}
ROWS, VALID_ROWS, STEPS = 22, 5, 6
TWO_REPLICAS = Layout(1, 1, 2)


# --- StepCounter


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rows = [*tiny.random_rows(6, 64, seed=5), [[1, 9, 2]], [[1, 2], [1, 2], [1, 7, 2]], [[1]], [[1], [1]]]
    return TokenStore.open(tiny.write_store(tmp_path_factory.mktemp("work") / "rows", rows))


@pytest.mark.parametrize("window", [None, 1, 8, 1000])
@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("cross", ["masked", "allowed"])
def test_step_counter(store: TokenStore, window: int | None, boundaries: bool, cross: Any) -> None:
    counter = StepCounter(
        store, window=window, train_sample_boundaries=boundaries, cross_sample_attention=cross
    )
    ids = np.array([[0, 3, EMPTY_ROW], [6, 7, EMPTY_ROW], [8, 9, 1]])
    rows = [store.row(int(row)) for row in ids.ravel() if row != EMPTY_ROW]
    pairs = 0
    for row in rows:
        segments = row.sample_lengths.tolist() if cross == "masked" else [len(row.tokens)]
        for length in segments:
            pairs += sum(
                query - key < (window or length) for query in range(length) for key in range(query + 1)
            )
    batch = build_packed_batch(
        rows,
        list(range(len(rows))),
        seq_length=64,
        vocabulary=tiny.VOCABULARY,
        train_sample_boundaries=boundaries,
        cross_sample_attention=cross,
    )
    assert counter.count(ids) == StepWork(
        rows=7,
        tokens=sum(len(row.tokens) for row in rows),
        targets=int(batch.loss_mask.sum()),
        attention_pairs=pairs,
    )


def test_step_counter_of_empty_rows(store: TokenStore) -> None:
    counter = StepCounter(store, window=8, train_sample_boundaries=True, cross_sample_attention="masked")
    assert counter.count(np.full((2, 2), EMPTY_ROW)) == StepWork(
        rows=0, tokens=0, targets=0, attention_pairs=0
    )


def test_model_flops_are_those_of_the_matrix_products() -> None:
    """Against torch's own count of a Hugging Face forward and backward pass (one sample, no window)."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**tiny.MODEL, "sliding_window": None}, attn_implementation="eager")
    model, length = MistralForCausalLM(config), 40
    with FlopCounterMode(display=False) as counted:
        model(torch.arange(length)[None]).logits.sum().backward()
    ours = FlopCounter.of(HFArchitecture.from_hf_config(config.to_dict()), config.vocab_size, "cpu")
    # eager attention computes all pairs, masked or not
    work = StepWork(rows=1, tokens=length, targets=length, attention_pairs=length**2)
    assert ours.tflops(work) * 1e12 == pytest.approx(counted.get_total_flops(), rel=1e-3)
    assert ours.peak_tflops is None
    architecture = HFArchitecture.from_hf_config(tiny.MODEL)
    assert FlopCounter.of(architecture, 403, "NVIDIA A100-SXM4-40GB").peak_tflops == 312
    assert FlopCounter.of(architecture, 403, "NVIDIA H100 PCIe").peak_tflops == 756
    assert FlopCounter.of(architecture, 403, "NVIDIA H100 80GB HBM3").peak_tflops == 989


# --- a whole run


def run_config(
    directory: Path, tiny_model: Any, run: Path, layout: Layout = TWO_REPLICAS, **sections: Any
) -> Any:
    config = jobs.run_config(
        layout,
        data={"train_data_path": (str(directory / "train"),), "valid_data_path": str(directory / "valid")},
        training={"eval_interval": 2, **sections.pop("training", {})},
        checkpoint={
            "save": str(run),
            "pretrained_checkpoint": str(tiny_model.root),
            "save_interval": 2,
            **sections.pop("checkpoint", {}),
        },
    )
    return dataclasses.replace(config, logging=LoggingConfig(log_interval=2))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("metrics")
    tiny.write_store(directory / "train", tiny.random_rows(ROWS, 64, seed=1))
    tiny.write_store(directory / "valid", tiny.random_rows(VALID_ROWS, 64, seed=2))
    return directory


@pytest.fixture(scope="module")
def run(stores: Path, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "run"
    results = run_ranks(2, jobs.train, run_config(stores, tiny_model, directory))
    assert [result["code"] for result in results] == [0, 0]
    return directory


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == kind
    ]


def test_fields_are_exactly_those_of_the_document(run: Path) -> None:
    expected = {"train": (TRAIN_FIELDS, range(1, STEPS + 1)), "eval": (EVAL_FIELDS, (2, 4, 6))}
    for kind, (fields, steps) in {**expected, "checkpoint": (CHECKPOINT_FIELDS, (2, 4, 6))}.items():
        found = lines(run, kind)
        assert [line["step"] for line in found] == list(steps)
        assert all(set(line) == fields for line in found)
    assert [(line["step"], line["what"]) for line in lines(run, "event")] == [(0, "start")]


def test_numbers_of_a_run(run: Path, stores: Path) -> None:
    store = TokenStore.open(stores / "train")
    train = lines(run, "train")
    assert [line["consumed_rows"] for line in train] == [4, 8, 12, 16, 20, 22]
    for index, line in enumerate(train):
        rows = [store.row(row) for row in range(4 * index, min(4 * index + 4, ROWS))]
        targets = sum(len(row.tokens) - len(row.sample_lengths) for row in rows)
        assert line["tokens"] == targets  # `corrected`: no loss on the step to the next sample's bos
        tokens = sum(len(row.tokens) for row in rows)
        assert line["tokens_per_s"] * line["step_time_s"] == pytest.approx(tokens)
        assert line["loss_bos"] is None and line["mfu"] is None
        assert line["memory_gib"] > 0 and line["tflops_per_rank"] > 0
    for line in lines(run, "eval"):
        valid = TokenStore.open(stores / "valid")
        assert line["rows"] == VALID_ROWS
        assert line["tokens"] == valid.tokens - len(valid.sample_lengths())
    assert [line["lr"] for line in train][:2] == [0.0, 1e-3]


def test_losses_by_kind_add_up(run: Path, stores: Path) -> None:
    """The loss is the mean of the kinds', weighted by the targets of each kind in the step's rows."""
    store, kinds = TokenStore.open(stores / "train"), tiny.VOCABULARY.kind_of_id()
    for index, line in enumerate(lines(run, "train")):
        counts: collections.Counter[str] = collections.Counter()
        for row_id in range(4 * index, min(4 * index + 4, ROWS)):
            row = store.row(row_id)
            starts = np.cumsum(row.sample_lengths) - row.sample_lengths
            targets = np.delete(
                row.tokens, starts
            )  # each token but a sample's first is the target of the one before
            counts.update(KINDS[kind] for kind in kinds[targets])
        total = sum(counts[kind] * (line[f"loss_{kind}"] or 0.0) for kind in KINDS)
        assert line["loss"] == pytest.approx(total / counts.total(), rel=1e-6)
        assert {kind for kind in KINDS if line[f"loss_{kind}"] is not None} == set(counts)


def test_checkpoint_lines_name_what_is_there(run: Path) -> None:
    for line in lines(run, "checkpoint"):
        path = Path(line["path"])
        assert path == run / f"iter_{line['step']:07d}" and path.is_dir()
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "integrity.json"]
        assert line["bytes"] == sum(file.stat().st_size for file in files)
        assert line["stall_s"] > 0


def test_files_of_a_run(run: Path) -> None:
    assert json.loads((run / "exit.json").read_text()) == {"code": 0, "reason": "done", "step": STEPS}
    assert (run / "latest_checkpointed_iteration.txt").read_text().strip() == str(STEPS)
    assert (run / "run_config.yaml").read_text() == (run / "iter_0000006" / "run_config.yaml").read_text()
    assert list((run / "tensorboard").glob("events.*"))
    assert not (run / "best_checkpointed_iteration.txt").exists()


def test_floats_are_written_in_full(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    reporter = Reporter(tmp_path / "run", LoggingConfig(), {}, 1, enabled=True)
    reporter.write("train", 1, loss=0.1 + 0.2, lr=1e-300, mfu=None)
    reporter.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == '{"kind": "train", "step": 1, "loss": 0.30000000000000004, "lr": 1e-300, "mfu": null}\n'
    silent = Reporter(tmp_path / "nowhere", LoggingConfig(), {}, 1, enabled=False)
    silent.event(1, "nothing")
    silent.close()
    assert not (tmp_path / "nowhere").exists()


def test_lines_of_abandoned_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = ['{"kind": "train", "step": 1}', '{"kind": "eval", "step": 2}']
    path.write_text(
        "\n".join([*kept, '{"kind": "train", "step": 3}', "", "null", '{"step": "x"}', '{"kind": "tr']) + "\n"
    )
    assert forget_steps_after(tmp_path, 2) == 5
    assert path.read_text().splitlines() == kept
    assert forget_steps_after(tmp_path, 2) == 0
    assert forget_steps_after(tmp_path / "nowhere", 2) == 0


# --- which checkpoints stay


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("iter_*"))


def rising_eval_job(environment: Any, store: Any, config: Any, losses: list[float]) -> int:
    """`jobs.train` with evaluation losses of our choice (one a step)."""
    from usdm_megatron.train.loop import Loop

    evaluate, chosen = Loop.evaluate, iter(losses)

    def chosen_objective(loop: Loop) -> Any:
        return dataclasses.replace(evaluate(loop), objective=next(chosen))

    Loop.evaluate = chosen_objective  # type: ignore[method-assign]  # this process is the job's alone
    return jobs.train(environment, store, config)["code"]


@pytest.mark.parametrize(
    ("losses", "limit", "kept", "best"),
    [
        ((3.0, 1.0, 2.0, 4.0, 5.0, 1.0), 2, [2, 5, 6], 2),  # an equal loss later is not better
        ((3.0, 2.0, float("nan"), 4.0, 1.0, 2.0), 1, [5, 6], 5),
        ((9.0, 8.0, 7.0, 6.0, 5.0, 4.0), 1, [6], 6),
    ],
    ids=str,
)
def test_best_and_newest_checkpoints_stay(
    losses: tuple[float, ...],
    limit: int,
    kept: list[int],
    best: int,
    stores: Path,
    tiny_model: Any,
    tmp_path: Path,
) -> None:
    config = run_config(
        stores,
        tiny_model,
        tmp_path / "run",
        Layout(),
        training={"eval_interval": 1},
        checkpoint={"save_interval": 1, "save_total_limit": limit, "keep_best": True},
    )
    assert run_ranks(1, rising_eval_job, config, list(losses)) == [0]
    assert steps_kept(tmp_path / "run") == kept
    assert (tmp_path / "run" / "best_checkpointed_iteration.txt").read_text().strip() == str(best)


def test_evaluation_once_an_epoch(stores: Path, tiny_model: Any, tmp_path: Path) -> None:
    config = run_config(
        stores,
        tiny_model,
        tmp_path / "run",
        Layout(),
        training={"eval_interval": "epoch", "num_train_epochs": 2},
        checkpoint={"save_interval": 100, "save_total_limit": 1},
    )
    assert run_ranks(1, jobs.train, config)[0]["code"] == 0
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [STEPS, 2 * STEPS]
    assert steps_kept(tmp_path / "run") == [2 * STEPS]  # always a save at the end
    assert [line["consumed_rows"] for line in lines(tmp_path / "run", "train")][5:7] == [22, 26]


# --- host syncs


READS = {
    "item",
    "tolist",
    "cpu",
    "nonzero",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
}


class HostReads:
    """Counts calls that read a tensor on the host, by `file:function read` of the innermost caller."""

    def __init__(self) -> None:
        from torch.overrides import TorchFunctionMode

        self.counts: collections.Counter[str] = collections.Counter()
        counts = self.counts

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = getattr(func, "__name__", "")
                if name in READS or (name == "where" and len(args) == 1):
                    frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
                    file = frames[-1].filename
                    place = file[max(file.rfind("/megatron/"), file.rfind("/usdm_megatron/")) + 1 :]
                    counts[f"{place}:{frames[-1].name} {name}"] += 1
                return func(*args, **(kwargs or {}))

        self.mode = Mode()


def test_the_counter_sees_reads() -> None:
    reads, x = HostReads(), torch.ones(1)
    with reads.mode:
        x.item(), x.tolist(), x.cpu(), x.nonzero(), x.numpy(), float(x), int(x), bool(x), [0, 1][x.long()]
        torch.where(x), torch.where(x > 0, x, x), x + 1
        torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(x)], 1.0)  # reads nothing
    found = collections.Counter(place.rsplit(" ")[-1] for place in reads.counts.elements())
    names = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "where")
    assert {name: found[name] for name in names} == dict.fromkeys(names, 1)
    assert found["nonzero"] >= 1


def count_reads_job(
    environment: Any, store: Any, layout: Layout, checkpoint: Path, micro_batches: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Host reads of one training step, and of one evaluation step, after a first of each."""
    rows = tiny.random_rows(micro_batches, 64, seed=1)
    config = jobs.run_config(layout, data={"global_batch_size": micro_batches * layout.dp})
    with jobs.opened(environment, store, layout) as groups:
        engine, facts = jobs.load_engine(config, checkpoint, groups)
        batches = [jobs.batch_of([row], config, facts.vocabulary).to(groups.device) for row in rows]
        for _ in range(2):
            training, evaluation = HostReads(), HostReads()
            with training.mode:
                result = engine.step.train(
                    batches, engine.optimizer, targets=100, lr=1e-3, stop=lambda: False
                )
            with evaluation.mode:
                engine.step.evaluate(batches)
            assert result.finite
    return dict(training.counts), dict(evaluation.counts)


READ_LAYOUTS = [
    Layout(extra=(("recompute_granularity", "full"),)),
    Layout(2, 1, sp=True),
    Layout(1, 2),
    Layout(1, 2, vpp=3),
    Layout(1, 1, 2, extra=(("overlap_grad_reduce", True), ("overlap_param_gather", True))),
]


@pytest.mark.parametrize("layout", READ_LAYOUTS, ids=str)
def test_a_step_reads_the_host_once(layout: Layout, tiny_model: Any) -> None:
    """One read a step, whatever the number of micro-batches, layers, stages; none in an evaluation step."""
    # megatron-core 0.16.1 looks, after every fork of its random state (the dropout of embeddings under
    # sequence parallel), whether the CPU generator moved: a host tensor on CUDA too, so nothing waits for it
    core = {"megatron/core/tensor_parallel/random.py:fork item"}
    for training, evaluation in run_ranks(layout.ranks, count_reads_job, layout, tiny_model.release, 4):
        if layout.sp:
            assert core <= training.keys()
        # losses by kind, gradient norm and the wish to stop, in one tensor
        assert without(core, training) == {"usdm_megatron/train/step.py:_sum_over_world tolist": 1}
        assert without(core, evaluation) == {}


def without(places: set[str], counts: dict[str, int]) -> dict[str, int]:
    return {place: count for place, count in counts.items() if place not in places}
