#!/usr/bin/env bash
# What belongs to OUT/scaling-2.json of nccl.sh, with as many layers (DEPTH) as it has: one GPU, and two GPUs that exchange
# data through the host's memory, as slowly as between hosts, compressed all-gathers too. About seven minutes.
source "$(dirname "$0")/common.sh"
export NCCL_NVLS_ENABLE=0
: "${DEPTH:?set DEPTH to the layers of the other run: model.depth in its scaling-2.json}"
TORCHRUN="$PYTHON -m torch.distributed.run --standalone"
SCALING="-m benchmarks.scaling --out $OUT --depth $DEPTH ${MORE:-}"

slow() {
    NCCL_P2P_DISABLE=1 step 200 gathering-slow $TORCHRUN --nproc-per-node 2 -m benchmarks.gathering --out $OUT \
        --modes eager --batches 4 --name gathering-slow ${MORE:-}
    NCCL_P2P_DISABLE=1 step 240 scaling-2-slow $TORCHRUN --nproc-per-node 2 $SCALING --eager --rounds 2 \
        --name scaling-2-slow
}
one() { step 150 scaling-1 $TORCHRUN --nproc-per-node 1 $SCALING; }
WIDTH=2 streams slow one
