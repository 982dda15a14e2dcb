#!/usr/bin/env bash
# Ablations of the quickstart, after it: its GRPO again with one part changed, from its SFT model. Each model rewrites
# the 276 validation questions greedily. About 10 minutes each.
#   bash scripts/ablations.sh [NAME ...]      default: all; finished ones are kept; the table has all that are there
# Variables: FROM=outputs/demo_smollm2 (the quickstart's outputs)  OUT=outputs/ablations
set -feuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
from=${FROM:-outputs/demo_smollm2} out=${OUT:-outputs/ablations} py=${PYTHON:-.venv/bin/python}
data=data/demo actor=actor_rollout_ref.actor rollout=actor_rollout_ref.rollout
declare -A changes=(
  [reciprocal]="reward=reciprocal"    # 1/r; reward=mrr is the same function
  [exponential]="reward=exponential"
  [no_warm_up]="actor_rollout_ref.model.path=data/models/smollm2-135m"
  [four_samples]="$rollout.n=4 $rollout.n_train=null"
  [learn_from_all]="$rollout.n_train=null"
  [no_entropy_bonus]="$actor.entropy_coeff=0"
  [two_epochs]="$actor.ppo_epochs=2"
  [kl]="$actor.use_kl_loss=true"
  [refill]="algorithm.filter_groups.enable=true"
  [llds]="algorithm=grpo_llds"
  [fp32]="actor_rollout_ref.model.dtype=fp32 $rollout.dtype=fp32"
)
all="reciprocal exponential no_warm_up four_samples learn_from_all no_entropy_bonus two_epochs kl refill llds fp32"

judge() { # NAME MODEL
  "$py" -m convsearch.infer --model_name_or_path "$2" --input_path $data/validation.json --prompt_style compact \
    --output_path "$out/$1.jsonl" --max_tokens 56 --temperature 0 --batch_size 128
  "$py" -m eval.bm25 --index_dir_path data/indexes/bm25_demo --test_file_path "$out/$1.jsonl" --test_type rewrite \
    --trec_gold_qrel_file_path $data/validation.trec --qrel_output_dir "$out" --output_trec_file "$1.trec"
}
[ -f "$out/full.trec" ] || judge full "$from/grpo/model"
[ -f "$out/no_rl.trec" ] || judge no_rl "$from/sft/model"
for name in ${*:-$all}; do
  [ ! -f "$out/$name.trec" ] || continue
  printf '\n== %s (%(%H:%M:%S)T)\n' "$name" -1
  OUT=$out/$name bash scripts/run.sh demo_smollm2 grpo "actor_rollout_ref.model.path=$from/sft/model" \
    ${changes[$name]?no such ablation}
  judge "$name" "$out/$name/grpo/model"
  set +f; rm -rf "$out/$name/grpo"/global_step_*; set -f # 1.6 GB each
done
table=()
for name in full no_rl $all; do
  [ ! -f "$out/$name.trec" ] || table+=("$out/$name.trec@$out/$name.jsonl")
done
"$py" -m eval.summary --qrels $data/validation.trec --output "$out/results.json" "${table[@]}"
