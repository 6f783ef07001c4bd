"""Memory that is freed stays with the process, if it is glibc's: blocks after the first fault no pages in."""

from __future__ import annotations

import platform
import resource

import numpy as np
import pytest

from usdm_megatron.preprocess.executors import ProcessExecutor, open_executor

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc has no mallopt")


def faults_of_a_block(_: int) -> int:
    """Page faults of arrays as a block of text takes them: 4 MiB, in two pieces."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        ids = np.ones(1 << 20, np.uint16)
        assert int((ids == 1).sum()) == 1 << 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_blocks_fault_no_pages_in() -> None:
    open_executor("processes", 1)
    here = [faults_of_a_block(task) for task in range(3)]
    in_workers = list(ProcessExecutor(2).map(faults_of_a_block, range(6)))
    assert max(here[1:]) < 100 and sorted(in_workers)[3] < 100  # a worker's first block takes the pages
