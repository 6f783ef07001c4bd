#!/usr/bin/env bash
# The same tests on one CUDA GPU (USDM_TEST_DEVICE=cuda is what they read), and those marked `gpu`.
# What needs more GPUs than there are is skipped and listed at the end.
#
#   bash scripts/gpu_check.sh [pytest arguments]
#
# Exit code: pytest's; 2 when there is no GPU to check.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then
    echo "gpu_check: no NVIDIA GPU here (nvidia-smi lists none); nothing was checked. CPU tests: bash scripts/test.sh" >&2
    exit 2
fi
source scripts/setup.sh dev
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: there is a GPU, but $PYTHON's torch $("$PYTHON" -c 'import torch; print(torch.__version__)')" \
        "cannot use it; install a CUDA build of torch (or set TORCH_SPEC and remove .venv). Nothing was checked." >&2
    exit 2
fi

"$PYTHON" - <<'PY'
import importlib.util
import torch

properties = torch.cuda.get_device_properties(0)
extras = {"transformer_engine": "te", "flash_attn": "flash"}
print(f"device     {torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
print(f"torch      {torch.__version__}, CUDA {torch.version.cuda}")
for module, backend in extras.items():
    there = importlib.util.find_spec(module) is not None
    print(f"{backend:<10} {module} is {'installed' if there else 'not installed: its tests are skipped'}")
PY

log="$(mktemp)"
status=0
USDM_TEST_DEVICE=cuda "$PYTHON" -m pytest -q -rs -m "not exhaustive" --durations=10 "$@" 2>&1 | tee "$log" ||
    status="${PIPESTATUS[0]}"
# pytest prints `SKIPPED [count] file:line: reason`; tests that want more devices say "GPUs" in the reason
printf '\nskipped for want of more GPUs:\n'
grep -E '^SKIPPED .*GPUs' "$log" || echo "  none"
rm -f "$log"
exit "$status"
