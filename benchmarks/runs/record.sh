#!/usr/bin/env bash
# The GPU tests, 30 processes at a time: OUT/gpu_record.json. About five minutes on two GPUs.
source "$(dirname "$0")/common.sh"
export SEMISPARSE_REQUIRE_GPU=1
step 590 record "$PYTHON" tests/record_gpu.py "$OUT" "${WORKERS:-30}"
tail -n 25 "$OUT/record.log"
