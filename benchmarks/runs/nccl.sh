#!/usr/bin/env bash
# Two GPUs: tests over NCCL, bytes and times of compressed all-gathers, and scaling, all eager: OUT/gathering.json and
# OUT/scaling-2.json. About nine minutes.
source "$(dirname "$0")/common.sh"
export NCCL_NVLS_ENABLE=0 SEMISPARSE_REQUIRE_GPU=1
TORCHRUN="$PYTHON -m torch.distributed.run --nproc-per-node 2"

step 130 tests "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/gpu/test_two_gpus.py tests/gpu/test_gathering.py \
    "tests/gemm/test_engine_gpu.py::test_another_device_than_the_current_one"
step 190 gathering $TORCHRUN -m benchmarks.gathering --out "$OUT" --modes eager
step 250 scaling $TORCHRUN -m benchmarks.scaling --out "$OUT" --eager
