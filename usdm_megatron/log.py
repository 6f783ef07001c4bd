"""Keep a run's output to what its reader can act on."""

from __future__ import annotations

import logging
import warnings

# (message, module): upstream notes about upstream code, seen on torch 2.13 / megatron-core 0.16.1
_KNOWN = (
    (r".*", r"megatron\.core\..*"),  # no Apex, deprecated names inside core
    (r".*ShardedTensor.*", r".*"),  # core's checkpoint format is built on it
    (r"The \.grad attribute of a Tensor that is not a leaf.*", r".*"),  # core's fp32 shards are views
    (r"`torch\.distributed\.\w+` is deprecated.*", r".*"),  # called by core
    (r"`?load_state_dict`? is deprecated.*", r".*"),
)


def quiet_upstream() -> None:
    """Silence megatron-core's warnings and the known ones of torch about core; call before importing core."""
    for message, module in _KNOWN:
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", message=message, module=module, category=category)
    logging.getLogger("megatron").setLevel(logging.ERROR)
