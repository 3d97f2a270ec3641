#!/usr/bin/env bash
# Time to loss on the source of Linux: results in OUT, which may hold earlier ones; those are not run again.
#
#     TOKENS=linux-tokens bash benchmarks/runs/llama_linux.sh OUT rates    dense bf16 at RATES; two minutes each
#     LR=2e-4 SEEDS="0 1 2" ... llama_linux.sh OUT runs                    the runs in the order of their importance
#
# The runs begin with the seconds per step of each arm, all on one GPU (five minutes), which those of equal seconds need.
# TOKENS is the folder that `semisparse-lab data linux` or `data unpack` made. STEPS, RATE_STEPS and MORE (options) are
# passed on; RUNS names the runs of each seed, ARM:BUDGET.
source "$(dirname "$0")/common.sh"
: "${TOKENS:?set TOKENS to the folder of the text}" "${SECONDS_LIMIT:=590}" "${STEPS:=3000}" "${SEEDS:=0 1 2}"
: "${RUNS:=bf16:tokens fp8-24:tokens float8:tokens bf16-24:tokens fp8-24-mvue:tokens \
fp8-24:seconds float8:seconds fp8-24-mvue:seconds}"
RUN="$PYTHON -m semisparse_lab experiment llama-linux --data-dir $TOKENS ${MORE:-} --minutes \$(awk \"BEGIN{print \$LEFT / 60}\")"

case ${2:-} in
rates)
    for rate in ${RATES:-4e-4 2e-4 8e-4}; do
        echo "rate-$rate $RUN --out $OUT/rate-$rate --arms bf16 --steps ${RATE_STEPS:-600} --lr $rate"
    done
    ;;
runs)
    for arm in bf16 fp8-24 float8 bf16-24 fp8-24-mvue; do
        times="${times:-} [ -e $OUT/llama-linux.$arm.times.json ] || $RUN --out $OUT --time-only 60 --arms $arm;"
    done
    echo "times $times"
    for seed in $SEEDS; do
        for one in $RUNS; do
            echo "run-${one/:/-}-$seed $RUN --out $OUT --arms ${one%:*} --budget ${one#*:} --seeds $seed --steps $STEPS" \
                "--lr ${LR:?set LR to the best of rates}"
        done
    done
    ;;
*)
    echo "the second argument is rates or runs" >&2
    exit 2
    ;;
esac | queue "$SECONDS_LIMIT"
