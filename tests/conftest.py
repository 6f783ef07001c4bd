"""Which device the tests run on: the CPU, unless USDM_TEST_DEVICE=cuda (`scripts/gpu_check.sh`)."""

import os
import signal

if os.environ.get("USDM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks


def pytest_configure() -> None:
    """A shell's background job ignores SIGINT, and so would every process that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
