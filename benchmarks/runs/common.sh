# Sourced by the runs beside it, each of which is one machine's work, most of them for less than ten minutes:
#
#     bash benchmarks/runs/NAME.sh OUT
#
# Every step has its own time limit and log in OUT, and what failed does not stop what follows. GPUs are used side by side
# where a run has several streams; with one GPU the streams follow each other.

set -u
OUT=$(realpath -m "$1")
mkdir -p "$OUT"
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export PYTHONPATH="src:lab/src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
: "${PYTHON:=python3}"
BENCHMARK="$PYTHON benchmarks/benchmark_semi_structured_training.py"
: "${GPUS:=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"

# step SECONDS NAME COMMAND...: its output goes to OUT/NAME.log; one line says how it ended. Returns its exit code.
step() {
    local limit=$1 name=$2 begin=$SECONDS code
    shift 2
    timeout "$limit" ${PIN:-} "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$(printf %4d $SECONDS) s  $name: exit $code after $((SECONDS - begin)) s"
    [ $code = 0 ] || tail -n 5 "$OUT/$name.log"
    return $code
}

# streams FUNCTION...: as many at the same time as there are GPUs, each with one of them and its share of the cores; what
# is left over follows. With WIDTH=2 each has two GPUs.
streams() {
    local width=${WIDTH:-1} functions=("$@") slots all cores slot first at
    slots=$((GPUS / width < $# ? GPUS / width : $#))
    if [ "$slots" -lt 2 ]; then
        for slot in "$@"; do "$slot"; done
        return
    fi
    all=$(getconf _NPROCESSORS_ONLN)
    cores=$((all < slots ? 1 : all / slots))
    for ((slot = 0; slot < slots; slot++)); do
        (
            export CUDA_VISIBLE_DEVICES PIN
            CUDA_VISIBLE_DEVICES=$(seq -s, $((slot * width)) $((slot * width + width - 1)))
            first=$((slot * cores % all))
            PIN="taskset -c $first-$((first + cores - 1))"
            for ((at = slot; at < ${#functions[@]}; at += slots)); do "${functions[at]}"; done
        ) &
    done
    wait
}

# queue SECONDS: lines of standard input, "NAME COMMAND...", are run in their order, one at a time on each GPU, until
# SECONDS after the script began; a command finds the seconds that are left in $LEFT. Returns 1 if one failed, or if there
# was no time for some.
queue() {
    local limit=$1 folder left failed
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
            step "$LEFT" "${line%% *}" bash -c "${line#* }" || echo "${line%% *}" >>"$folder/failed"
        done
    }
    streams $(printf '_work %.0s' $(seq $((GPUS > 1 ? GPUS : 1))))
    left=$(tail -n "+$(($(cat "$folder/next") + 1))" "$folder/lines" | cut -d ' ' -f 1 | tr '\n' ' ')
    failed=$(cat "$folder/failed" 2>/dev/null)
    rm -r "$folder"
    [ -z "$left" ] || echo "no time was left for: $left"
    [ -z "$left$failed" ]
}
