#!/usr/bin/env bash
# What plans predict for compiled models, and what is measured: OUT/plan-*.json. Three to five minutes a model; CARDS
# names some of the six.
source "$(dirname "$0")/common.sh"
export SEMISPARSE_TUNE=1
: "${SECONDS_LIMIT:=590}"
: "${CARDS:=convnext gpt2 bert-base timm-vit-l llama-4096 llama}"

for card in $CARDS; do echo "plan-$card $BENCHMARK --plan --prepare --card $card --save $OUT"; done | queue "$SECONDS_LIMIT"
