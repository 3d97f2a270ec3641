#!/usr/bin/env bash
# Whole steps and layers whose dense is timed in a fresh process, one process each, and what the first sparse product of
# a process changes. Needs torchao for the rows of its float8, which run without anything sparse, and in --neighbours.
#
#     bash benchmarks/runs/fresh.sh OUT [NAME...]    all, or those of these names, such as llama or 'compare-*'
#
# What the GPU bounds runs side by side: fifteen minutes on four GPUs, an hour on one. What the host bounds follows, one
# at a time, since processes beside it slow it down: half an hour. OUT/*.json and OUT/*.csv belong in benchmarks/results.
source "$(dirname "$0")/common.sh"
: "${SECONDS_LIMIT:=6000}"
shift
SPARSE="2:4 mvue mvue-repack fp8 fp8-2:4 fp8-mvue"

# layer SHAPE: the rows of a layer, with and without sparse products.
layer() {
    echo "linear-$1 $BENCHMARK --linear --mkn $1 --save $OUT"
    echo "compare-linear-$1 $BENCHMARK --compare --rows $SPARSE --mkn $1 --save $OUT"
    echo "float8-linear-$1 $BENCHMARK --compare --rows float8 fp8 --mkn $1 --save $OUT"
}

bound_by_gpu() {
    local card mkn
    for card in llama-4096 llama timm-vit-l; do
        echo "compare-$card $BENCHMARK --compare --prepare --rows $SPARSE --card $card --save $OUT"
    done
    echo "power $BENCHMARK --power --save $OUT"
    for card in llama-4096 llama timm-vit-l; do
        echo "float8-$card $BENCHMARK --compare --rows float8 fp8 --card $card --save $OUT"
    done
    for card in llama timm-vit-l sam-vit-l llama-eager; do echo "$card $BENCHMARK --card $card --save $OUT"; done
    for mkn in 16384,4096,11008 16384,2048,8192; do
        layer $mkn
        echo "neighbours-$mkn $BENCHMARK --neighbours --mkn $mkn --save $OUT"
    done
}

bound_by_host() {
    local card mkn
    for card in timm-vit-l-32-eager timm-vit-l-32-mlp-eager bert-base llama-1-eager; do
        echo "$card $BENCHMARK --card $card --save $OUT"
    done
    for mkn in 13008,1024,4096 13008,4096,1024; do
        layer $mkn
        echo "eager-$mkn $BENCHMARK --eager --mkn $mkn --save $OUT"
    done
    for mkn in 4096,768,768 4096,768,3072 4096,3072,768 6304,1024,4096 6304,4096,1024 16384,1024,1024 2048,2048,8192; do
        echo "small-$mkn $BENCHMARK --no-gain --mkn $mkn --save $OUT"
    done
}

# asked: of the lines "NAME COMMAND..." of standard input those with one of NAMES, or all.
asked() {
    local name command pattern
    while read -r name command; do
        for pattern in "${NAMES[@]-*}"; do
            [[ $name != $pattern ]] || { echo "$name $command"; break; }
        done
    done
}

for pattern in "$@"; do
    NAMES=("$pattern")
    [ -n "$({ bound_by_gpu; bound_by_host; } | asked)" ] || { echo "nothing is named $pattern" >&2; exit 2; }
done
NAMES=("$@")
code=0
bound_by_gpu | asked | queue "$SECONDS_LIMIT" || code=1
bound_by_host | asked | GPUS=1 queue "$SECONDS_LIMIT" || code=1
exit $code
