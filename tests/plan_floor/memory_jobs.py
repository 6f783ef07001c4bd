"""What ranks measure for the planner's tests (module level, so that forked ranks can import it)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tests.training.jobs import Layout, batch_of, opened, run_config
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=300, unit_count=100)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to measure, small enough for seconds, with activations that outweigh the weights."""

    layout: Layout
    seq_length: int = 1024
    micro_batch_size: int = 1
    micro_batches: int = 2
    bf16: bool = False
    layers: int = 4
    architecture: tuple[tuple[str, Any], ...] = ()

    @property
    def model(self) -> HFArchitecture:
        fields: dict[str, Any] = {
            "hidden": 64,
            "layers": self.layers,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "ffn": 224,
            "vocab_size": VOCABULARY.size,
            "max_positions": 8192,
            "sliding_window": None,
        }
        return HFArchitecture(**{**fields, **dict(self.architecture)})

    def __str__(self) -> str:
        kind = "bf16" if self.bf16 else "fp32"
        return f"{self.layout}-m{self.micro_batches}x{self.micro_batch_size}-{kind}"


def measure(environment: Any, store: Any, case: Case) -> dict[str, Any]:
    """Bytes that this rank holds: exact sums of what stays, and the peak of a step by three meters."""
    import torch

    from tests.plan_floor.live_memory import LiveBytes, SavedBytes, kernel_peak, map_blocks
    from usdm_megatron.log import quiet_upstream
    from usdm_megatron.train.engine import build_engine

    quiet_upstream()
    map_blocks()
    torch.manual_seed(0)
    length = case.seq_length
    config = run_config(
        case.layout,
        data={"seq_length": length, "micro_batch_size": case.micro_batch_size},
        training={"bf16": case.bf16},
    )
    with opened(environment, store, case.layout) as groups:
        from usdm_megatron.runtime.process_groups import seed_rank

        seed_rank(0, groups.coordinates)
        engine = build_engine(config, case.model, VOCABULARY, groups, "torch")
        with torch.no_grad():
            for model in engine.models:
                for parameter in model.parameters():
                    parameter.normal_(0, 0.02)
        engine.optimizer.reload_masters()
        rng = np.random.default_rng(0)
        row = [rng.integers(3, 300, size=size).tolist() for size in (length // 3, length - length // 3)]
        batches = [
            batch_of([row] * case.micro_batch_size, config, VOCABULARY) for _ in range(case.micro_batches)
        ]

        def step() -> None:
            targets = length * case.micro_batch_size * case.micro_batches
            engine.step.train(batches, engine.optimizer, targets=targets, lr=1e-4, stop=lambda: False)

        step()  # what is made once and stays
        result = _static(engine)
        result["pp"] = groups.coordinates.pp
        parameters = [p for model in engine.models for p in model.parameters()]
        with SavedBytes(parameters).watch() as saved:
            step()
        result["saved"] = saved.peak
        with LiveBytes() as live:
            step()
        result["live"] = live.peak
        result["live_start"] = live.at_start
        result["largest"] = sorted(live.largest)[-60:]
        with kernel_peak() as risen:
            step()
        result["kernel"] = live.at_start + risen["bytes"]
        return result


def _static(engine: Any) -> dict[str, Any]:
    """Weights, gradients and optimizer state, each storage counted once."""
    from tests.plan_floor.live_memory import storages

    parameters = [p for model in engine.models for p in model.parameters()]
    weights = storages(parameters)
    gradients = storages(buffer.grad_data for ddp in engine.wrapped for buffer in ddp.buffers)
    adam = engine.optimizer._sharded.optimizer
    states = [p for p in adam.state] + [t for entry in adam.state.values() for t in entry.values()]
    state = {key: size for key, size in storages(states).items() if key not in weights}
    return {
        "parameters": engine.parameters,
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(state.values()),
    }
