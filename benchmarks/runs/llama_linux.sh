#!/usr/bin/env bash
# Time to loss on the source of Linux: results in OUT, which may hold earlier ones; those are not run again.
#
#     TOKENS=linux-tokens bash benchmarks/runs/llama_linux.sh OUT rates    dense bf16 at RATES; two minutes each
#     SEEDS="0 1 2" ... llama_linux.sh OUT runs                            the runs in the order of their importance
#     SEED=0 ... llama_linux.sh OUT study                                  other schedules, each in its OUT/study-NAME
#
# The runs begin with the seconds per step of each arm, all on one GPU (five minutes), which those of equal seconds need.
# TOKENS is the folder that `semisparse-lab data linux` or `data unpack` made. LR (the best of rates), STEPS, RATE_STEPS
# and MORE (options) are passed on; RUNS names the runs of each seed, ARM:BUDGET, and STUDY those of the study, NAME:ARM.
# With fewer than NEEDS seconds left no run of the study is started.
source "$(dirname "$0")/common.sh"
: "${TOKENS:?set TOKENS to the folder of the text}" "${SECONDS_LIMIT:=590}" "${STEPS:=2500}" "${SEEDS:=0 1 2}"
: "${RUNS:=bf16:tokens fp8-24:tokens float8:tokens bf16-24:tokens fp8-24-mvue:tokens \
fp8-24:seconds float8:seconds fp8-24-mvue:seconds bf16-24:seconds}" "${SEED:=0}" "${NEEDS:=260}" "${LR:=1.4e-4}"
RUN="$PYTHON -m semisparse_lab experiment llama-linux --data-dir $TOKENS ${MORE:-} --minutes \$(awk \"BEGIN{print \$LEFT / 60}\")"

case ${2:-} in
rates)
    for rate in ${RATES:-1e-4 1.4e-4 2e-4 2.8e-4}; do
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
                "--lr $LR"
        done
    done
    ;;
study) # a folder for each schedule, because files of one folder share their settings
    while read -r name arm options; do
        [[ " ${STUDY:-$name:$arm} " == *" $name:$arm "* ]] || continue
        [ -e "$OUT/study-$name/llama-linux.$arm.tokens.seed$SEED.json" ] && continue
        echo "study-$name-$arm [ \$LEFT -ge $NEEDS ] || { echo \$LEFT s are left, too few; exit 0; };" \
            "$RUN --out $OUT/study-$name --arms $arm --seeds $SEED --steps $STEPS --lr $LR $options"
    done <<END
repeat      fp8-24
share-0.5   fp8-24  --sparse-fraction 0.5
share-0.85  fp8-24  --sparse-fraction 0.85
hold-0      bf16    --hold 0
hold-0      fp8-24  --hold 0
start-0.05  fp8-24  --dense-start 0.05
refresh-40  fp8-24  --refresh-every 40
mlp         fp8-24  --layers mlp
share-1.0   fp8-24  --sparse-fraction 1.0
start-0.02  fp8-24  --dense-start 0.02
share-0.5   bf16-24 --sparse-fraction 0.5
mlp         bf16-24 --layers mlp
share-0.85  bf16-24 --sparse-fraction 0.85
start-0.05  bf16-24 --dense-start 0.05
refresh-40  bf16-24 --refresh-every 40
END
    ;;
*)
    echo "the second argument is rates, runs or study" >&2
    exit 2
    ;;
esac | queue "$SECONDS_LIMIT"
