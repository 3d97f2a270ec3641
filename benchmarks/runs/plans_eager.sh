#!/usr/bin/env bash
# What plans predict for the ten eager models, and what is measured: OUT/plan-*-eager.json. About nine minutes on two GPUs.
source "$(dirname "$0")/common.sh"
export SEMISPARSE_TUNE=1

plans() { step 570 "plans-$1" $BENCHMARK --plan --card "${@:2}" --save "$OUT"; }
first() { plans 0 llama-1-eager timm-vit-l-eager bert-base-eager convnext-16-eager llama-eager; }
second() { plans 1 timm-vit-l-32-eager gpt2-2-eager llama-4096-eager gpt2-eager convnext-eager; }
streams first second
