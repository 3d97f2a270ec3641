#!/usr/bin/env bash
# What plans predict for eager models, and what is measured: OUT/plan-*-eager.json. About 100 seconds a model; all ten
# take nine minutes on two GPUs of a fast host. CARDS names some of them.
source "$(dirname "$0")/common.sh"
export SEMISPARSE_TUNE=1
: "${SECONDS_LIMIT:=590}"
: "${CARDS:=llama-eager gpt2-eager convnext-eager llama-1-eager timm-vit-l-32-eager timm-vit-l-eager gpt2-2-eager
    bert-base-eager llama-4096-eager convnext-16-eager}"

for card in $CARDS; do echo "plan-$card $BENCHMARK --plan --card $card --save $OUT"; done | queue "$SECONDS_LIMIT"
