"""The precision-aware path, with an Adam of Transformer Engine's interface in its place (no CUDA here)."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import Layout

ROWS = tiny.random_rows(4, 64, seed=6)
STEPS = 3


class FusedAdam(torch.optim.Optimizer):
    """`transformer_engine.pytorch.optimizers.FusedAdam` as core and we use it, in plain arithmetic."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, *,
        adam_w_mode: bool, master_weights: bool, use_decoupled_grad: bool, store_param_remainders: bool,
        master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any,
    ) -> None:  # fmt: skip
        assert adam_w_mode and master_weights and use_decoupled_grad and not store_param_remainders
        assert {master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype} == {torch.float32}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def initialize_state(self, param: Any, store_param_remainders: bool) -> None:
        self.state[param] = {
            "exp_avg": torch.zeros_like(param, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32),
            "master_param": param.detach().float(),
        }

    def get_unscaled_state(self, param: Any, name: str) -> Any:
        return self.state[param][name]

    def set_scaled_state(self, param: Any, name: str, value: Any) -> None:
        self.state[param][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                state = self.state[param]
                master, (beta1, beta2) = state["master_param"], group["betas"]
                grad = param.decoupled_grad.float()
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                spread = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                master.mul_(1 - group["lr"] * group["weight_decay"])
                master.addcdiv_(state["exp_avg"] / (1 - beta1 ** group["step"]), spread, value=-group["lr"])
                param.copy_(master)


def put_in_place() -> None:
    """As if core had found Transformer Engine when it was imported."""
    import megatron.core.optimizer as core
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]  # ours
    optimizer_config.is_te_min_version = lambda version: True
    core.is_te_min_version = lambda version: True
    core.USING_PYTORCH_OPTIMIZER, core.Adam, distrib_optimizer.Adam = False, FusedAdam, FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def trained(environment: Any, store: Any, layout: Layout, checkpoint: Path, precision_aware: bool) -> Any:
    """Loss and clipped norm of each step, and the state after them, resumed once on the way."""
    from usdm_megatron.data.order import RowOrder

    if precision_aware:
        put_in_place()
    config = jobs.run_config(
        layout,
        optimizer={"use_precision_aware_optimizer": precision_aware, "clip_grad": 0.5},
        training={"bf16": True},
    )
    with jobs.opened(environment, store, layout) as groups:
        engine, facts = jobs.load_engine(config, checkpoint, groups)
        ids = RowOrder(4, 4, 4, 1, layout.dp).rows_of_step(0, groups.coordinates.dp).tolist()
        batches = [jobs.batch_of([ROWS[row] for row in rows], config, facts.vocabulary, rows) for rows in ids]
        targets = sum(len(sample) - 1 for row in ROWS for sample in row)
        results = []
        for _ in range(STEPS):
            result = engine.step.train(
                batches, engine.optimizer, targets=targets, lr=1e-3, stop=lambda: False
            )
            results.append((result.losses.objective, result.gradient_norm))
        (model,) = engine.models
        state = engine.optimizer.sharded_state(model.sharded_state_dict(), loading=False)["param_state"]
        tensors = {
            f"{leaf.key} {leaf.global_offset}": leaf.data.clone()
            for entry in state.values()
            for leaf in entry.values()
            if hasattr(leaf, "global_offset")
        }
        return {"steps": results, "tensors": tensors, "bytes": engine.optimizer.state_bytes()}


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 1, 2)], ids=str)
def test_precision_aware_training_is_the_other(layout: Layout, tiny_model: Any) -> None:
    """Masters start from the loaded weights, gradients are clipped, states are saved under the same names."""
    plain = run_ranks(layout.ranks, trained, layout, tiny_model.release, False)
    aware = run_ranks(layout.ranks, trained, layout, tiny_model.release, True)
    for ours, expected in zip(aware, plain, strict=True):
        assert ours["steps"][0][1] > 0.5, "nothing was clipped"
        assert ours["steps"] == [pytest.approx(step, rel=1e-3) for step in expected["steps"]]
        assert ours["tensors"].keys() == expected["tensors"].keys() and ours["tensors"]
        for key, tensor in expected["tensors"].items():
            assert ours["tensors"][key].dtype == torch.float32
            assert (ours["tensors"][key] - tensor).norm() <= 1e-2 * tensor.norm(), key
        assert ours["bytes"] <= expected["bytes"]
