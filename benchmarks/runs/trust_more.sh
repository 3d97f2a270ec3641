#!/usr/bin/env bash
# The trust suite, second half: graphs, leaks and convergence on one GPU, the soak on the other: OUT/a/trust.json and
# OUT/b/trust.json. About nine minutes on two GPUs; with MORE=--quick a few minutes without a GPU.
source "$(dirname "$0")/common.sh"
source benchmarks/runs/trust_parts.sh

first() { trust a graphs,leaks,convergence; }
second() { trust b soak --seconds 420; }
streams first second
