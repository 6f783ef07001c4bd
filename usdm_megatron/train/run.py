"""One rank's run, from a configuration to its last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_megatron.config import RunConfig
from usdm_megatron.config_file import dump_config
from usdm_megatron.errors import EXIT_DONE, EXIT_FAULT, Preempted, TrainingFault, UserError
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.runtime.ranks import RankEnvironment

if TYPE_CHECKING:
    import torch.distributed as dist

    from usdm_megatron.data.blend import TrainRows
    from usdm_megatron.data.loader import MicroBatchLoader
    from usdm_megatron.data.order import RowOrder
    from usdm_megatron.runtime.process_groups import ProcessGroups
    from usdm_megatron.train.loop import Loop
    from usdm_megatron.train.lora_start import LoraStart
    from usdm_megatron.train.preemption import StopRequest
    from usdm_megatron.train.preflight import RunPlan
    from usdm_megatron.vocab import Vocabulary

EXIT_FILE = "exit.json"
_STEP_COUNT_BYTES = 4
_PAD_MULTIPLE = 64  # tokens, on each tensor parallel rank: matrices whose sides suit a GPU's tiles


def run_training(config: RunConfig, environment: RankEnvironment, store: dist.Store | None = None) -> int:
    """Run this rank; returns the exit code, which rank 0 also leaves in `RUN/exit.json`.

    `store` is where ranks meet instead of the environment's address (tests: a file). Raises `UserError`
    before step 0 for wrong input; faults of ours propagate with their traceback.
    """
    from usdm_megatron.train.preemption import stop_on_signal
    from usdm_megatron.train.preflight import build_layout

    layout = build_layout(config, environment.world_size)
    record = _ExitRecord(config)
    # caught until the record is written: a launcher that saw a rank die sends SIGTERM to the others
    with stop_on_signal() as stop:
        return _run_and_record(config, layout, environment, store, stop, record)


def _run_and_record(
    config: RunConfig,
    layout: ParallelLayout,
    environment: RankEnvironment,
    store: dist.Store | None,
    stop: StopRequest,
    record: _ExitRecord,
) -> int:
    try:
        step = _train(config, layout, environment, store, stop, record)
    except Preempted as preempted:
        record.write(preempted.exit_code, str(preempted), preempted.step)
        return preempted.exit_code
    except UserError as error:
        record.write(error.exit_code, "; ".join(error.problems), None)
        raise
    except TrainingFault as fault:
        record.write(fault.exit_code, str(fault), None)
        if environment.rank == 0:
            print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    except BaseException as error:
        record.write(EXIT_FAULT, f"{type(error).__name__}: {error}", None)
        raise
    record.write(EXIT_DONE, "done", step)
    return EXIT_DONE


def read_exit_code(config: RunConfig, since: float) -> int | None:
    """The code in `RUN/exit.json` if it was written after `since` (seconds of the epoch): a launcher's own
    code does not tell a preempted run from a failed one."""
    path = Path(config.checkpoint.save or "") / EXIT_FILE
    if not path.is_file() or path.stat().st_mtime < since:
        return None
    return int(json.loads(path.read_text(encoding="utf-8"))["code"])


class _ExitRecord:
    """`exit.json`: how the last start ended. Only a start that owns the directory touches it."""

    def __init__(self, config: RunConfig) -> None:
        self._path = Path(config.checkpoint.save or "") / EXIT_FILE
        self._owns = False

    def take_over(self) -> None:
        """This start is the directory's: what the one before it left is history. Rank 0 alone."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._owns = True

    def write(self, code: int, reason: str, step: int | None) -> None:
        if self._owns:
            self._path.write_text(json.dumps({"code": code, "reason": reason, "step": step}) + "\n")


def _train(
    config: RunConfig,
    layout: ParallelLayout,
    environment: RankEnvironment,
    store: dist.Store | None,
    stop: StopRequest,
    record: _ExitRecord,
) -> int:
    from usdm_megatron.checkpoint.ranks import on_every_rank, on_rank_zero
    from usdm_megatron.runtime.deterministic import enter_deterministic_mode
    from usdm_megatron.runtime.process_groups import open_process_groups
    from usdm_megatron.train.preflight import plan_run
    from usdm_megatron.train.start import find_start

    if config.training.deterministic_mode:
        enter_deterministic_mode()
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    with open_process_groups(layout, environment, timeout=timeout, store=store) as groups:
        start = on_rank_zero("resolving the checkpoint to start from", lambda: find_start(config))
        plans: list[RunPlan] = []  # stays here: maps do not travel; what travels is whether all ranks agree
        on_every_rank("checking the run", lambda: plans.append(plan_run(config, layout, start)))
        (plan,) = plans
        if start.step == plan.steps:
            if environment.rank == 0:
                print(
                    f"{start.directory} is already at the last step, {start.step}: nothing to do", flush=True
                )
            return start.step
        on_rank_zero(f"making {config.checkpoint.save}", record.take_over)
        with ExitStack() as stack:
            loop, state = _assemble(plan, groups, stack)
            return loop.run(state, stop).step


def _assemble(plan: RunPlan, groups: ProcessGroups, stack: ExitStack) -> tuple[Loop, Any]:
    """Build model, optimizer, loaders and reporter, and load the checkpoint."""
    import torch

    from usdm_megatron.checkpoint.commit import remove_stale_temporaries
    from usdm_megatron.checkpoint.ranks import on_rank_zero
    from usdm_megatron.data.step_work import StepCounter
    from usdm_megatron.runtime.process_groups import seed_rank
    from usdm_megatron.train.engine import build_engine
    from usdm_megatron.train.loop import Loop
    from usdm_megatron.train.metrics import FlopCounter, Reporter, forget_steps_after
    from usdm_megatron.train.run_checkpoint import RunCheckpoints, layout_record
    from usdm_megatron.train.start import RUN_CONFIG_FILE, TrainState

    config, start, is_main = plan.config, plan.start, groups.rank == 0
    run = Path(config.checkpoint.save or "")
    seed_rank(config.training.seed, groups.coordinates)
    engine = build_engine(config, plan.architecture, plan.facts.vocabulary, groups, plan.backend)
    checkpoints = RunCheckpoints(config, plan.facts, engine.models, engine.optimizer, groups, start.lora)
    checkpoints.load(start)

    def prepare_directory() -> None:
        remove_stale_temporaries(run)
        forget_steps_after(run, start.step)
        (run / RUN_CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")

    on_rank_zero(f"preparing {run}", prepare_directory)
    reporter = Reporter(
        run,
        config.logging,
        dataclasses.asdict(config),
        plan.steps,
        enabled=is_main,
        start_step=start.step,
    )
    stack.callback(reporter.close)
    if start.lora is not None:
        state_bytes = _sum_over_ranks(engine.optimizer.own_state_bytes(), groups)
        _announce_lora(plan, start.lora, state_bytes, reporter)
    _announce(plan, engine.parameters, groups, reporter)
    state = start.state or TrainState(
        task=config.task, step=0, consumed_rows=0, train_store=plan.train_store.identity, layout={}
    )
    state = dataclasses.replace(state, layout=layout_record(groups.layout))
    loop = Loop(
        config=config,
        order=plan.order,
        loader=stack.enter_context(_loader(plan, groups, training=True)),
        valid_order=plan.valid_order,
        valid_loader=None
        if plan.valid_order is None
        else stack.enter_context(_loader(plan, groups, training=False)),
        counter=StepCounter(
            plan.train_store,
            window=plan.architecture.sliding_window,
            train_sample_boundaries=config.training.train_sample_boundaries,
            cross_sample_attention=config.model.cross_sample_attention,
        ),
        schedule=plan.schedule,
        step=engine.step,
        optimizer=engine.optimizer,
        flops=FlopCounter.of(
            plan.architecture,
            plan.facts.vocabulary.size,
            torch.cuda.get_device_name() if groups.device.type == "cuda" else "cpu",
            adapter_parameters=_adapter_parameters(plan),
        ),
        reporter=reporter,
        save=checkpoints.save,
        memory_gib=_peak_memory_gib(groups.device.type),
        world_size=groups.layout.world_size,
    )
    return loop, state


def _loader(plan: RunPlan, groups: ProcessGroups, *, training: bool) -> MicroBatchLoader:
    store, order = (plan.train_store, plan.order) if training else (plan.valid_store, plan.valid_order)
    assert store is not None and order is not None
    return open_loader(plan.config, store, order, plan.facts.vocabulary, groups)


def open_loader(
    config: RunConfig, store: TrainRows, order: RowOrder, vocabulary: Vocabulary, groups: ProcessGroups
) -> MicroBatchLoader:
    """The micro-batches that this rank reads of `store`."""
    from usdm_megatron.data.loader import MicroBatchLoader

    return MicroBatchLoader(
        store,
        order,
        groups.coordinates.dp,
        seq_length=config.data.seq_length,
        vocabulary=vocabulary,
        train_sample_boundaries=config.training.train_sample_boundaries,
        cross_sample_attention=config.model.cross_sample_attention,
        pad_to_multiple_of=None if config.data.row_padding == "full" else _PAD_MULTIPLE * groups.layout.tp,
        one_length=groups.layout.pp > 1,  # a pipeline's messages have one shape
        device=groups.device,
    )


def _announce(plan: RunPlan, parameters: int, groups: ProcessGroups, reporter: Any) -> None:
    from usdm_megatron.data.blend import samples_per_row, shares_of
    from usdm_megatron.recipes import recipe_fields

    layout, config = groups.layout, plan.config
    differences = ", ".join(
        f"{field}={getattr(getattr(config, section), field)}"
        for section, fields in recipe_fields(config.recipe, config.task).items()
        for field in fields
        if section != "lora" or config.lora.enabled
    )
    precision = "bf16" if config.training.bf16 else "fp32"
    reporter.say(
        f"{layout.world_size} ranks: tp={layout.tp} pp={layout.pp} vpp={layout.vpp} dp={layout.dp} · "
        f"{groups.device.type}, {precision}, {plan.backend} attention · {parameters:,} parameters on rank 0"
    )
    reporter.say(f"recipe {config.recipe}: {differences}")
    reporter.say(
        f"{plan.steps} steps of {config.data.global_batch_size} rows ({plan.micro_batches} "
        "micro-batches a rank) "
        f"from {plan.train_store.prefix} ({plan.train_store.rows:,} rows, {plan.train_store.tokens:,} tokens)"
    )
    for share in shares_of(plan.train_store):
        reporter.say(f"  {share}")
    if config.task == "sft" and (dialogs := samples_per_row(plan.train_store)) > 1:
        reporter.say(
            f"rows are packed: about {dialogs:.1f} dialogs a row, "
            f"{dialogs * config.data.global_batch_size:.0f} dialogs a step"
        )
    for skipped in plan.start.checkpoint.skipped:
        reporter.event(
            plan.start.step, "skipped checkpoint", path=str(skipped.path), why="; ".join(skipped.problems)
        )
    if plan.start.state is not None:
        reporter.event(plan.start.step, "resume", path=str(plan.start.directory))
    else:
        reporter.event(0, "start", path=str(plan.start.directory))


def _announce_lora(plan: RunPlan, lora: LoraStart, state_bytes: int, reporter: Any) -> None:
    from usdm_megatron.train.lora_start import adapter_tensors, frozen_rows_warning, trainable_parameters

    spec = lora.facts.spec
    trainable = trainable_parameters(spec, plan.architecture, plan.facts.vocabulary)
    reporter.event(
        plan.start.step,
        "lora",
        base=str(lora.base),
        trainable_parameters=trainable,
        # as one AdamW over the whole adapter: shards of a tensor have a step count each, it has one
        optimizer_bytes=state_bytes + _STEP_COUNT_BYTES * adapter_tensors(spec, plan.architecture),
    )
    if (warning := frozen_rows_warning(lora)) is not None:
        reporter.event(plan.start.step, "warning", why=warning)


def _adapter_parameters(plan: RunPlan) -> int | None:
    """Those of A and B; None when all weights train."""
    from usdm_megatron.train.lora_start import trainable_parameters

    if (spec := plan.config.lora.spec) is None:
        return None
    factors = dataclasses.replace(spec, train_new_embeddings=False)
    return trainable_parameters(factors, plan.architecture, plan.facts.vocabulary)


def _sum_over_ranks(count: int, groups: ProcessGroups) -> int:
    import torch
    import torch.distributed as dist

    total = torch.tensor(count, dtype=torch.int64, device=groups.device)
    dist.all_reduce(total)
    return int(total)


def _peak_memory_gib(device: str) -> Any:
    if device == "cuda":
        import torch

        return lambda: torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
