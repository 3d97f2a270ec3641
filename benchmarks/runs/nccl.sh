#!/usr/bin/env bash
# Tests over NCCL, bytes and times of compressed all-gathers, and scaling with compiled blocks: OUT/gathering.json and
# OUT/scaling-*.json. Nine minutes on four GPUs, as two pairs and then together; on two GPUs what fits into that time.
source "$(dirname "$0")/common.sh"
export NCCL_NVLS_ENABLE=0 SEMISPARSE_REQUIRE_GPU=1
TORCHRUN="$PYTHON -m torch.distributed.run --standalone --nproc-per-node"
SCALING="-m benchmarks.scaling --out $OUT ${MORE:-}"
: "${WITHIN:=590}"

tests() {
    step 150 tests "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_two_gpus.py tests/gpu/test_gathering.py \
        "tests/gemm/test_engine_gpu.py::test_another_device_than_the_current_one"
    step 200 gathering $TORCHRUN 2 -m benchmarks.gathering --out "$OUT" --modes eager ${MORE:-}
}
scaling() { step 340 scaling-2 $TORCHRUN 2 $SCALING ${DEPTH:+--depth $DEPTH}; }

WIDTH=2 streams tests scaling
if [ "$GPUS" -ge 4 ]; then
    : "${DEPTH:=$("$PYTHON" -c "import json; print(json.load(open('$OUT/scaling-2.json'))['model']['depth'])")}"
    step $((WITHIN - SECONDS)) scaling-4 $TORCHRUN 4 $SCALING ${DEPTH:+--depth $DEPTH}
fi
