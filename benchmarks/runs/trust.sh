#!/usr/bin/env bash
# The trust suite: OUT/STREAM/trust.json of each stream, of which each takes up to nine minutes of one GPU; the four parts
# of algorithms have a folder each. On four GPUs:
#
#     bash benchmarks/runs/trust.sh OUT; bash benchmarks/runs/trust.sh OUT others soak
#
# With MORE=--quick a few minutes without a GPU. Parts end by themselves, and what is found is written all the time, so
# that ending a step loses nothing.
source "$(dirname "$0")/common.sh"
: "${WITHIN:=520}" # seconds for one stream

# trust STREAM PARTS OPTION...: parts of the suite, each in a process of its own; MORE replaces the options.
trust() {
    step $((WITHIN + 30)) "trust-$1" "$PYTHON" -m tests.trust "$OUT/$1" --parts "$2" --within "$WITHIN" ${MORE:-${*:3}}
}
numerics() { trust numerics numerics; }
rest() { trust rest numerics-2,determinism; }
# Side by side on one GPU, which none of them fills.
algorithms() {
    local quarter
    for quarter in algorithms algorithms-2 algorithms-3 algorithms-4; do trust $quarter $quarter & done
    wait
}
sanitizer() { trust sanitizer sanitizer; }
others() { trust others graphs,leaks,convergence; }
soak() { trust soak soak --seconds 420; }

shift
[ $# -gt 0 ] || set -- numerics rest algorithms sanitizer
streams "$@"
