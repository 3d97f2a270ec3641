#!/usr/bin/env bash
# What plans predict for the ten eager models, and what is measured: OUT/plan-*-eager.json. About nine minutes on two GPUs.
source "$(dirname "$0")/common.sh"
export SEMISPARSE_TUNE=1

plans() {
    local card
    for card in "$@"; do step 170 "plan-$card" $BENCHMARK --plan --card "$card" --save "$OUT"; done
}
first() { plans llama-1-eager llama-eager timm-vit-l-eager bert-base-eager gpt2-2-eager; }
second() { plans timm-vit-l-32-eager llama-4096-eager gpt2-eager convnext-16-eager convnext-eager; }
streams first second
