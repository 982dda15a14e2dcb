#!/usr/bin/env bash
# The whole two-stage job of one CPU experiment, stage by stage; every stage keeps what is done and goes on from there.
#   bash scripts/job_cpu.sh demo_smollm2 | mtrag_smollm2 | topiocqa_proxy_smollm2
#   SEED=2    another seed (its own output folder)          QUICK=1    a smoke run of every stage
#   RAW=DIR   the raw data of mtrag or topiocqa             OUT=DIR    output folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
experiment=${1:-demo_smollm2} SEED=${SEED:-1} QUICK=${QUICK:-0}
py=.venv/bin/python
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# Activations of some gigabytes come and go at every step: keep the memory, in huge pages, rather than fault it in again (about 1.7 times faster here; docs/experiments.md).
export MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_THRESHOLD_=17179869184 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
model=data/models/smollm2-135m
distill=(--k 3 --limit 280) sft=() grpo=() infer=()
[ "$QUICK" = 1 ] && suffix=_quick || suffix=""
[ "$SEED" = 1 ] || suffix="${suffix}_seed$SEED"
out=${OUT:-outputs/$experiment$suffix}

stage() { printf '\n== %s (%(%H:%M:%S)T)\n' "$1" -1; }

stage "data"
case $experiment in
  demo_smollm2)
    data=data/demo train=train.json test=test.json qrels=test.trec
    $py -m data_preprocess.demo --output $data --prompt-style compact ;;
  mtrag_smollm2)
    data=data/mtrag train=train.json test=test.json qrels=test.trec
    $py -m data_preprocess.mtrag --input "${RAW:?set RAW to the folder of MTRAG}" --output $data --prompt-style compact --max-history-turns 2 ;;
  topiocqa_proxy_smollm2)
    data=data/topiocqa_proxy train=train.json test=dev.json qrels=dev.trec
    $py -m data_preprocess.topiocqa --proxy --input "${RAW:?set RAW to topiocqa.zip}" --output $data --prompt-style compact --max-history-turns 3 ;;
  *) echo "error: $experiment is not one of demo_smollm2, mtrag_smollm2, topiocqa_proxy_smollm2" >&2; exit 2 ;;
esac
history=()
[ $experiment = mtrag_smollm2 ] && history=(--max_history_turns 2)
[ $experiment = topiocqa_proxy_smollm2 ] && history=(--max_history_turns 3)
mkdir -p "$out"
# Test questions of this run: all of the demo's, the first 100 of MTRAG's 239 (its prompts are long), the first 500 of the proxy's 2,340.
limit=1000000
[ $experiment = mtrag_smollm2 ] && limit=100
[ $experiment = topiocqa_proxy_smollm2 ] && limit=500
[ "$QUICK" = 1 ] && limit=16
head -n $limit $data/$test > "$out/test.json"
awk 'NR == FNR { if (match($0, /"qid": *"[^"]*"/)) { q = substr($0, RSTART, RLENGTH); gsub(/"qid": *"|"$/, "", q); keep[q] } next } $1 in keep' \
  "$out/test.json" $data/$qrels > "$out/test.trec"
# Rank 1 is rare on these two (docs/experiments.md): the warm-up takes more questions, and the best rewrite of each that brings the gold passage into the first five.
[ $experiment = topiocqa_proxy_smollm2 ] && distill=(--k 3 --limit 450 --rank_limit 5)
[ $experiment = mtrag_smollm2 ] && distill=(--k 2 --limit 300 --rank_limit 5)
if [ "$QUICK" = 1 ]; then
  distill=(--k 2 --limit 24)
  sft=(trainer.total_training_steps=2 data.train_batch_size=4 data.micro_batch_size_per_gpu=4)
  grpo=(trainer.total_training_steps=2 data.train_batch_size=2 actor_rollout_ref.actor.ppo_mini_batch_size=2 data.val_max_samples=8)
  infer=(--max_tokens 48)
fi

stage "base model"
$py -m data_preprocess.demo_model --output $model

stage "index"
index=data/indexes/bm25_$(basename $data)
$py -m retriever_server.index bm25 --collection $data/collection.jsonl --output "$index" --overwrite

rewrite() { # NAME MODEL: rewrites of the test questions
  $py -m convsearch.infer --model_name_or_path "$2" --model_name ConvSearch-R1 --temperature 0.7 --max_tokens 64 --seed "$SEED" --prompt_style compact \
    "${history[@]}" "${infer[@]}" --input_path "$out/test.json" --output_path "$out/$1.jsonl"
}
search() { # NAME FILE WHICH_TEXT: the run of a file of questions
  $py -m eval.bm25 --index_dir_path "$index" --query_file "$2" --query_type "$3" --gold_qrel_file_path "$out/test.trec" \
    --retrieval_output_path "$out" --output_file_name "$1.trec"
}

stage "base model on the test questions"
rewrite zero_shot $model

stage "self-distillation"
$py -m convsearch.distill --model_name_or_path $model --input_path $data/$train --output_dir "$out/distill" --retriever_url "embedded:$index" \
  --scaffold --prompt_style compact --max_tokens 128 --batch_size 72 --shuffle_seed 1 --seed "$SEED" "${history[@]}" "${distill[@]}"

stage "SFT"
$py -m convsearch.sft experiment=$experiment data.train_files="$out/distill/sft.parquet" trainer.default_local_dir="$out/sft" trainer.seed="$SEED" "${sft[@]}"
rewrite sft "$out/sft/model"

stage "GRPO"
$py -m convsearch.grpo experiment=$experiment actor_rollout_ref.model.path="$out/sft/model" retriever.url="embedded:$index" \
  data.train_files=$data/train.parquet data.val_files=$data/validation.parquet trainer.default_local_dir="$out/grpo" trainer.seed="$SEED" "${grpo[@]}"
$py -m convsearch.plots "$out/grpo" --output "$out/curves.png"
rewrite grpo "$out/grpo/model"

stage "searching"
search raw "$out/test.json" question
search previous "$out/test.json" previous
search history "$out/test.json" all_history
for name in zero_shot sft grpo; do search $name "$out/$name.jsonl" rewrite; done

stage "results of $experiment, seed $SEED: $(wc -l < "$out/test.json") test questions"
$py -m eval.summary --qrels "$out/test.trec" --output "$out/results.json" "raw question=$out/raw.trec" \
  "previous turn + question=$out/previous.trec" "all history=$out/history.trec" \
  "base model, zero-shot=$out/zero_shot.trec" "after SFT=$out/sft.trec" "after GRPO=$out/grpo.trec"
