#!/usr/bin/env bash
# What plans predict for compiled models, and what is measured: OUT/plan-*.json. About ten minutes on two GPUs. The sixth
# model, `llama`, takes three minutes more: $BENCHMARK --plan --card llama --prepare --save OUT.
source "$(dirname "$0")/common.sh"
export SEMISPARSE_TUNE=1

prepared() {
    local card variant
    for card in "$@"; do
        for variant in dense parts "2:4" "fp8 + 2:4"; do printf '%s\0%s\0' "$card" "$variant"; done
    done | XDG_CACHE_HOME=$(mktemp -d) SEMISPARSE_TUNE=0 xargs -0 -n 2 -P 4 "$PYTHON" -m benchmarks.prepare plan
}
plans() {
    local card
    step 240 "prepared-$1" bash -c 'prepared "$@"' - "$@"
    for card in "$@"; do step 200 "plan-$card" $BENCHMARK --plan --card "$card" --save "$OUT"; done
}
export -f prepared
export PYTHON
first() { plans timm-vit-l llama-4096; }
second() { plans gpt2 bert-base convnext; }
streams first second
