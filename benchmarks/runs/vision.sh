#!/usr/bin/env bash
# The ViT of width 384 for 80 epochs, every row with three seeds: results in OUT, which may hold earlier ones. Five minutes.
#
#     DATA=fashion-mnist bash benchmarks/runs/vision.sh OUT
#
# DATA is the folder with the four files of Fashion-MNIST. All rows train at the same time, several of them on each GPU,
# which these small models leave idle otherwise: what their steps take is not comparable.
source "$(dirname "$0")/common.sh"
: "${DATA:?set DATA to the folder of Fashion-MNIST}" "${WITHIN:=580}" "${SEEDS:=3}"

number=0
for row in dense sparse-040 sparse-060 sparse-070 sparse-080 sparse-090 sparse-100 signed-greedy; do
    (
        [ "$GPUS" -lt 2 ] || export CUDA_VISIBLE_DEVICES=$((number % GPUS))
        step "$WITHIN" "$row" "$PYTHON" -m semisparse_lab experiment vit-fashion-mnist --long --data-dir "$DATA" \
            --out "$OUT" --seeds "$SEEDS" --row "$row" ${MORE:-}
    ) &
    number=$((number + 1))
done
wait
