"""Which device the tests run on: the CPU, unless USDM_TEST_DEVICE=cuda (`scripts/gpu_check.sh`)."""

import os

if os.environ.get("USDM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
