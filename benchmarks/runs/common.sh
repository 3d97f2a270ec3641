# Sourced by the runs beside it, each of which is one machine's work for less than ten minutes:
#
#     bash benchmarks/runs/NAME.sh OUT
#
# Every step has its own time limit and log in OUT, and what failed does not stop what follows. Two GPUs are used side by
# side where a run has two streams; with one GPU the streams follow each other.

set -u
OUT=$(realpath -m "$1")
mkdir -p "$OUT"
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export PYTHONPATH="src:lab/src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
: "${PYTHON:=python3}"
BENCHMARK="$PYTHON benchmarks/benchmark_semi_structured_training.py"
: "${GPUS:=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"

# step SECONDS NAME COMMAND...: its output goes to OUT/NAME.log; one line says how it ended.
step() {
    local limit=$1 name=$2 begin=$SECONDS code
    shift 2
    timeout "$limit" ${PIN:-} "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$(printf %4d $SECONDS) s  $name: exit $code after $((SECONDS - begin)) s"
    [ $code = 0 ] || tail -n 5 "$OUT/$name.log"
}

# streams FUNCTION FUNCTION: at the same time if there are two GPUs, each with one of them and half of the cores.
streams() {
    local half=$(($(getconf _NPROCESSORS_ONLN) / 2))
    if [ "$GPUS" -ge 2 ]; then
        CUDA_VISIBLE_DEVICES=0 PIN="taskset -c 0-$((half - 1))" "$1" &
        CUDA_VISIBLE_DEVICES=1 PIN="taskset -c $half-$((2 * half - 1))" "$2" &
        wait
    else
        "$1"
        "$2"
    fi
}

# queue SECONDS: lines of standard input, "NAME COMMAND...", are run in their order, one at a time on each GPU, until
# SECONDS after the script began; a command finds the seconds that are left in $LEFT.
queue() {
    local limit=$1 folder
    folder=$(mktemp -d)
    cat >"$folder/lines"
    echo 0 >"$folder/next"
    _work() {
        local number line
        while [ $((limit - SECONDS)) -gt 0 ]; do
            number=$(flock "$folder/lock" bash -c 'number=$(($(cat "$0") + 1)); echo $number | tee "$0"' "$folder/next")
            line=$(sed -n "${number}p" "$folder/lines")
            [ -n "$line" ] || return 0
            export LEFT=$((limit - SECONDS))
            step "$LEFT" "${line%% *}" bash -c "${line#* }"
        done
    }
    streams _work _work
    rm -r "$folder"
}
