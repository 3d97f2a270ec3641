#!/usr/bin/env bash
# The trust suite, first half: numerics, algorithms and determinism on one GPU, compute-sanitizer on the other:
# OUT/a/trust.json and OUT/b/trust.json. About nine minutes on two GPUs; with MORE=--quick a few minutes without a GPU.
source "$(dirname "$0")/common.sh"
source benchmarks/runs/trust_parts.sh

first() { trust a numerics,algorithms,determinism; }
second() { trust b sanitizer; }
streams first second
