#!/usr/bin/env bash
# Scaling on one and two GPUs, blocks compiled, with as many layers (DEPTH) as OUT/../scaling-2.json of an eager run has;
# then two GPUs that exchange data through the host's memory, as slowly as between hosts. About nine minutes.
source "$(dirname "$0")/common.sh"
export NCCL_NVLS_ENABLE=0
: "${DEPTH:?set DEPTH to the layers of the eager run: model.depth in its scaling-2.json}"
TORCHRUN="$PYTHON -m torch.distributed.run"
SCALING="-m benchmarks.scaling --out $OUT --depth $DEPTH"

step 330 scaling-2 $TORCHRUN --nproc-per-node 2 $SCALING
NCCL_P2P_DISABLE=1 step 150 scaling-2-slow $TORCHRUN --nproc-per-node 2 $SCALING --eager --rounds 2 --name scaling-2-slow
step 110 scaling-1 $TORCHRUN --nproc-per-node 1 $SCALING
