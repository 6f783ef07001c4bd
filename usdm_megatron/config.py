"""The configuration of a run: one tree of frozen dataclasses, valid from birth.

Field names are Megatron's; the command line (`--tensor-model-parallel-size`) and
the YAML file (`parallel: {tensor_model_parallel_size: 2}`) come from them.
What needs a checkpoint, a token store or a world size to be checked is checked in
`train/preflight.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from usdm_megatron.blend_config import WeightedStore, blend_problems, parse_blend
from usdm_megatron.config_checks import below_one, meaningless
from usdm_megatron.errors import ConfigError
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.parallel_config import ParallelConfig as ParallelConfig
from usdm_megatron.recipes import DEFAULT_RECIPE, RecipeName, Task, recipe_fields

CoreAttention = Literal["auto", "te", "flash", "torch"]
CrossSampleAttention = Literal["masked", "allowed"]
RowPadding = Literal["full", "step"]
LossReduction = Literal["token-mean", "micro-batch-mean"]
_RECIPE = recipe_fields(DEFAULT_RECIPE)


@dataclass(frozen=True)
class ModelConfig:
    """How the model computes; its shape comes from the checkpoint."""

    core_attention: CoreAttention = "auto"
    """attention kernel; auto takes the first of te, flash, torch that is there, and says which"""
    cross_sample_attention: CrossSampleAttention = "masked"
    """whether the samples of a packed row see each other (allowed: the original's interference option)"""

    def problems(self) -> list[str]:
        return []


@dataclass(frozen=True)
class DataConfig:
    """Which rows are read, and how many at a time."""

    train_data_path: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(aliases=("--data-path",), metavar="[WEIGHT] PREFIX …")
    ] = None
    """prefix of the packed token store to train on, or a blend of several: 0.7 A 0.3 B"""
    valid_data_path: str | None = None
    """prefix of the packed token store to evaluate on"""
    seq_length: int = 8192
    """tokens of the longest row allowed, to which rows are padded"""
    row_padding: RowPadding = "full"
    """full: every row to --seq-length, so that each step takes the same memory; step: rows end to end, and in
    a pipeline a step's micro-batches to the longest of them (default of sft, whose rows are much shorter)"""
    micro_batch_size: int = 1
    """rows in one forward pass, flattened into one packed row"""
    global_batch_size: int = 8
    """store rows in one optimizer step, over all ranks"""
    shuffle: bool = False
    """a seeded permutation of the rows every epoch instead of the store's order"""

    def problems(self) -> list[str]:
        problems = [] if self.train_data_path is None else blend_problems(self.train_data_path)
        return problems + below_one(
            "data",
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
        )

    @property
    def train_stores(self) -> tuple[WeightedStore, ...]:
        """The stores to train on, in order; one of weight 1 where no weights are given."""
        return () if self.train_data_path is None else parse_blend(self.train_data_path)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate over time."""

    lr: float = 2e-5
    """peak learning rate"""
    min_lr: float = 0.0
    """learning rate at the end of the decay"""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """shape of the decay after warm-up"""
    lr_warmup_fraction: float | None = None
    """warm-up as a share of the decay steps, rounded up (0.03 unless --lr-warmup-iters is given)"""
    lr_warmup_iters: int | None = None
    """warm-up steps"""
    lr_decay_iters: int | None = None
    """steps from the start to min_lr (the whole run unless given)"""
    weight_decay: float = 0.01
    """decoupled weight decay"""
    decay_norms: bool = _RECIPE["optimizer"]["decay_norms"]
    """weight decay on norm weights too (recipe)"""
    clip_grad: float = _RECIPE["optimizer"]["clip_grad"]
    """largest global gradient norm; 0 = no clipping (recipe)"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.95
    """decay of the second moment"""
    adam_eps: float = 1e-8
    """added to the denominator"""
    use_precision_aware_optimizer: bool = False
    """Transformer Engine's Adam keeps the masters and reads gradients in the dtype of their sum (CUDA)"""
    optimizer_cpu_offload: bool = False
    """keep masters and moments in host memory, and update there (with the precision-aware optimizer)"""
    optimizer_offload_fraction: float = 1.0
    """share of them that --optimizer-cpu-offload takes"""

    def problems(self) -> list[str]:
        problems = [
            f"optimizer: {name} is {value}; it must not be negative"
            for name, value in (
                ("lr", self.lr),
                ("min_lr", self.min_lr),
                ("weight_decay", self.weight_decay),
                ("clip_grad", self.clip_grad),
                ("adam_eps", self.adam_eps),
                ("lr_warmup_iters", self.lr_warmup_iters or 0),
            )
            if value < 0
        ]
        problems += [
            f"optimizer: {name} is {value}; it must be in [0, 1)"
            for name, value in (
                ("adam_beta1", self.adam_beta1),
                ("adam_beta2", self.adam_beta2),
                ("lr_warmup_fraction", self.lr_warmup_fraction or 0.0),
            )
            if not 0 <= value < 1
        ]
        if not 0 < self.optimizer_offload_fraction <= 1:
            problems.append(
                f"optimizer: optimizer_offload_fraction is {self.optimizer_offload_fraction}; it must be in "
                "(0, 1]"
            )
        if self.optimizer_cpu_offload and not self.use_precision_aware_optimizer:
            problems.append(
                "optimizer: --optimizer-cpu-offload alone would leave the masters on the GPU; add "
                "--use-precision-aware-optimizer"
            )
        if self.min_lr > self.lr:
            problems.append(f"optimizer: min_lr {self.min_lr} is above lr {self.lr}; lower it")
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters is not None:
            problems.append("optimizer: both lr_warmup_fraction and lr_warmup_iters are given; keep one")
        if self.lr_decay_iters is not None and self.lr_decay_iters < 1:
            problems.append(f"optimizer: lr_decay_iters is {self.lr_decay_iters}; it must be at least 1")
        return problems


@dataclass(frozen=True)
class TrainingConfig:
    """How long, in which precision, and towards which objective."""

    train_iters: int | None = None
    """optimizer steps in all"""
    train_samples: int | None = None
    """store rows in all"""
    num_train_epochs: int | None = None
    """passes over the store (1 if none of the three is given)"""
    seed: int = 42
    """seed of shuffling and dropout"""
    bf16: bool = False
    """bf16 weights and activations with fp32 masters (default: on CUDA yes, on CPU no)"""
    deterministic_mode: bool = False
    """the same run gives the same bits: deterministic kernels and reductions alone, slower"""
    train_sample_boundaries: bool = _RECIPE["training"]["train_sample_boundaries"]
    """train the step from a sample's eos to the next one's bos (recipe)"""
    loss_reduction: LossReduction = _RECIPE["training"]["loss_reduction"]
    """mean over all target tokens of a step, or mean of the micro-batches' means (recipe)"""
    eval_interval: int | Literal["epoch"] = 1000
    """steps (or epoch) between evaluations; one more at the end"""

    def problems(self) -> list[str]:
        durations = {
            name: value
            for name, value in (
                ("train_iters", self.train_iters),
                ("train_samples", self.train_samples),
                ("num_train_epochs", self.num_train_epochs),
            )
            if value is not None
        }
        problems = below_one("training", **durations)
        if len(durations) > 1:
            problems.append(f"training: {' and '.join(durations)} are given together; keep exactly one")
        if isinstance(self.eval_interval, int):
            problems += below_one("training", eval_interval=self.eval_interval)
        return problems


@dataclass(frozen=True)
class LoraConfig:
    """Adapters that train over the frozen model; without --lora all weights train."""

    enabled: Annotated[bool, tyro.conf.arg(name="lora")] = False
    """train adapters over the frozen model instead of all weights"""
    r: Annotated[int, tyro.conf.arg(name="lora-r")] = 8
    """rank of an adapter"""
    alpha: Annotated[float, tyro.conf.arg(name="lora-alpha")] = 64.0
    """what an adapter adds is scaled by alpha / r (default of sft: 16)"""
    dropout: Annotated[float, tyro.conf.arg(name="lora-dropout")] = 0.1
    """share of an adapter's inputs that is dropped in training"""
    target_modules: Annotated[tuple[str, ...], tyro.conf.arg(name="lora-target-modules")] = (
        "q_proj",
        "v_proj",
    )
    """projections that get an adapter: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"""
    train_new_embeddings: bool = _RECIPE["lora"]["train_new_embeddings"]
    """train the embedding and output rows of the speech ids too (recipe; default of sft: no)"""

    @property
    def spec(self) -> LoraSpec | None:
        """What trains instead of all weights; None: nothing does."""
        return self._adapters() if self.enabled else None

    def problems(self) -> list[str]:
        try:
            self._adapters()
        except ConfigError as error:
            return list(error.problems)
        return []

    def _adapters(self) -> LoraSpec:
        targets = frozenset(self.target_modules)
        return LoraSpec(self.r, self.alpha, self.dropout, targets, self.train_new_embeddings)


@dataclass(frozen=True)
class CheckpointConfig:
    """Where weights come from and where the run is kept."""

    load: str | None = None
    """run or converted checkpoint to continue from"""
    save: str | None = None
    """run directory: checkpoints, metrics, resolved configuration"""
    pretrained_checkpoint: str | None = None
    """weights only, used when --load holds nothing yet; beside a LoRA run in --load, where its base is now"""
    ckpt_step: int | Literal["best"] | None = None
    """which checkpoint of --pretrained-checkpoint, or without one of --load, instead of the newest"""
    exit_on_missing_checkpoint: bool = False
    """an empty --load is an error instead of a fresh start"""
    save_interval: int | Literal["epoch"] = 1000
    """steps (or epoch) between checkpoints; one more at the end"""
    save_total_limit: int | None = None
    """newest checkpoints kept (all unless given)"""
    keep_best: bool = False
    """keep the checkpoint with the lowest evaluation loss whatever its age"""

    def problems(self) -> list[str]:
        problems = []
        if isinstance(self.save_interval, int):
            problems += below_one("checkpoint", save_interval=self.save_interval)
        if self.save_total_limit is not None:
            problems += below_one("checkpoint", save_total_limit=self.save_total_limit)
        return problems


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = 50
    """steps between log lines"""
    tensorboard_dir: str | None = None
    """TensorBoard directory (RUN/tensorboard unless given)"""
    wandb_project: str | None = None
    """Weights & Biases project; nothing leaves the machine unless given"""
    wandb_exp_name: str | None = None
    """Weights & Biases run name"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    def problems(self) -> list[str]:
        return below_one("logging", log_interval=self.log_interval)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does; raises `ConfigError` with all problems at once."""

    task: Task = "pretrain"
    """the command: pretrain trains on every token of packed rows, sft on the targets of a loss mask"""
    recipe: RecipeName = DEFAULT_RECIPE
    """usdm follows the original in all that changes numbers; corrected is what we recommend"""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        sections: dict[str, Any] = {
            "model": self.model,
            "parallel": self.parallel,
            "data": self.data,
            "optimizer": self.optimizer,
            "training": self.training,
            "lora": self.lora,
            "checkpoint": self.checkpoint,
            "logging": self.logging,
        }
        problems = [problem for section in sections.values() for problem in section.problems()]
        said = {problem.partition(";")[0] for problem in problems}  # one problem a value
        problems += [
            problem
            for name, section in sections.items()
            for problem in meaningless(name, section)
            if problem.partition(";")[0] not in said
        ]
        if not self.training.bf16:
            problems += self._of_bf16_alone()
        tokens = self.data.micro_batch_size * self.data.seq_length
        tp = self.parallel.tensor_model_parallel_size
        if self.parallel.sequence_parallel and tp > 1 and tokens % tp:
            problems.append(
                f"parallel: micro batch size x seq length = {tokens} does not divide over tp={tp} under "
                f"--sequence-parallel; set --seq-length to a multiple of {tp}"
            )
        if problems:
            raise ConfigError(*problems)

    def _of_bf16_alone(self) -> list[str]:
        asked = {
            "parallel: --no-accumulate-allreduce-grads-in-fp32 keeps gradients in the dtype of the weights": (
                not self.parallel.accumulate_allreduce_grads_in_fp32
            ),
            "optimizer: --use-precision-aware-optimizer keeps masters beside 16-bit weights": (
                self.optimizer.use_precision_aware_optimizer
            ),
        }
        return [
            f"{what}, and they are fp32; drop it or set --bf16"
            for what, is_asked in asked.items()
            if is_asked
        ]
