#!/usr/bin/env bash
# From the four collections to the bundled weights with their card: bash recipes/run.sh DATA
set -euo pipefail
data=$1 run=runs/default weights=src/chestxray_covid/weights
python recipes/train_lungs.py --data "$data" --output runs/lungs
cp runs/lungs/lungs.safetensors runs/lungs/lungs.json "$weights"
python recipes/train_default.py --data "$data" --output "$run"
python recipes/publish_default.py --data "$data" --run "$run"
python recipes/fit_gate.py --checkpoint "$weights/densenet121-v1" --split "$run/split.json" \
  --data "$data" --results docs/results/default/gate.json --limit 300 --count 160
python recipes/quantise_default.py --data "$data" --output "$weights/densenet121-v1"
python recipes/judge_default.py --data "$data" --run "$run" \
  --checkpoint "$weights/densenet121-v1"
python recipes/judge_recipe.py --data "$data" --run "$run"
python recipes/judge_recipe.py --data "$data" --run "$run" --without nih
python recipes/probe_inside.py --data "$data" --run "$run"
python recipes/probe_inside.py --data "$data" --run "$run" --lungs
python recipes/probe_inside.py --data "$data" --run "$run" --frame
python recipes/measure_fills.py --data "$data" --run "$run" \
  --checkpoint "$weights/densenet121-v1"
python recipes/measure_reduction.py --data "$data" --run "$run" \
  --checkpoint "$weights/densenet121-v1"
python recipes/list_tried.py --data "$data" --run "$run" \
  --checkpoint "$weights/densenet121-v1"
python recipes/audit_default.py --data "$data" --run "$run" \
  --checkpoint "$weights/densenet121-v1"
python recipes/judge_engines.py --data "$data"
python recipes/write_card.py
python docs/generate.py
