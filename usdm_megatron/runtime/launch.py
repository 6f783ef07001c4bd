"""Start ranks on this machine through torch's elastic launcher, and return the run's own exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from usdm_megatron.errors import EXIT_DONE, EXIT_FAULT
from usdm_megatron.runtime.ranks import LOOPBACK


def launch_local_ranks(module: str, argv: Sequence[str], ranks: int) -> int:
    """Run `python -m module *argv` as `ranks` local ranks; return the first failure's exit code, or 0.

    The elastic agent stops the other ranks when one fails and hands signals on. gloo is bound to the
    loopback interface; the agent's rendezvous store listens on every interface, as torchrun's does.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # gloo otherwise listens where the host's name resolves to; these ranks all live here
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    # as torchrun does, but leaving no core idle: ranks that share cores must not each take them all
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id="usdm-megatron",
        max_restarts=0,
        monitor_interval=0.1,
        **_forwarded_signals(LaunchConfig),
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *argv)
    except ChildFailedError as error:
        exit_code = error.get_first_failure()[1].exitcode
        return exit_code if exit_code > 0 else EXIT_FAULT
    except SignalException:
        return EXIT_FAULT  # ranks were asked to stop; RUN/exit.json says how that ended
    return EXIT_DONE


def _forwarded_signals(launch_config: type) -> dict[str, Any]:
    """SIGUSR1 asks a run to stop too; older torch forwards its own four alone."""
    known = {field.name for field in fields(launch_config)}
    return (
        {"signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"} if "signals_to_handle" in known else {}
    )
