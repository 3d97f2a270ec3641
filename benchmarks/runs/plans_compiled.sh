#!/usr/bin/env bash
# What plans predict for five compiled models, and what is measured: OUT/plan-*.json. About ten minutes on two GPUs. The
# sixth model, `llama`, is compiled whole: $BENCHMARK --plan --card llama --prepare --save OUT, four minutes.
source "$(dirname "$0")/common.sh"
export SEMISPARSE_TUNE=1

plans() { step 580 "plans-$1" $BENCHMARK --plan --prepare --card "${@:2}" --save "$OUT"; }
first() { plans 0 timm-vit-l gpt2; }
second() { plans 1 llama-4096 bert-base convnext; }
streams first second
