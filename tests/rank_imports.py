"""Imported once by the fork server, so that a rank starts in milliseconds."""

# ruff: noqa: E402 - upstream warns while it is imported
from usdm_megatron.log import quiet_upstream

quiet_upstream()

import megatron.core.models.gpt  # noqa: F401
import megatron.core.optimizer  # noqa: F401
import torch  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import transformers.models.mistral.modeling_mistral  # noqa: F401

import usdm_megatron.train.engine  # noqa: F401
import usdm_megatron.train.loop  # noqa: F401
