#!/usr/bin/env bash
# One experiment of the paper, from raw data to the table, on one node with 8 GPUs. Called by the files of scripts/paper/, which name the experiment:
#   bash scripts/paper/topiocqa_qwen_ance.sh [--dry-run] [STAGE ...]     stages: data index distill sft grpo infer eval (all of them by default)
#   --dry-run    composes and checks the configuration of every stage, prints the plan (GPUs, memory, steps, disk) and starts nothing
#   RAW=DIR   the raw data (data/raw/DATASET)      OUT=DIR   output folder (outputs/EXPERIMENT)      SEED=1      GPUS=8   GPUs a node     GPU_GIB=80
#   RETRIEVER_URL=http://HOST:PORT   a server that runs elsewhere, with the index of this experiment; otherwise this script starts one, on the CPU
#   ENCODER=MODEL   the query and passage encoder of ANCE      GRPO="KEY=VALUE ..."   more keys for GRPO, which win, as
#   GRPO="actor_rollout_ref.rollout.n=16"   (the authors' scripts on TopiOCQA; the paper has 8)
#   NNODES=2   with `ray start` on every node: scripts/multinode.sh; under Slurm: scripts/slurm.sbatch
# Every stage keeps what is done and goes on from there. SIGTERM saves at the end of the running step and ends with status 143; 3: the collapse guard.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${dataset:?call one of the files of scripts/paper/}" "${model:?}" "${retriever:?}"
experiment=paper_${dataset}_${model}_${retriever}
out=${OUT:-outputs/$experiment} data=data/$dataset gpus=${GPUS:-8} seed=${SEED:-1} nodes=${NNODES:-1} port=${PORT:-8000}
encoder=${ENCODER:-castorini/ance-msmarco-passage} index=data/indexes/${retriever}_$dataset url=${RETRIEVER_URL:-}
case $model in qwen) base=Qwen/Qwen2.5-3B-Instruct ;; llama) base=meta-llama/Llama-3.2-3B-Instruct ;; esac
case $dataset in topiocqa) test=dev k1=0.9 b=0.4 ;; qrecc) test=test k1=0.82 b=0.68 ;; esac
read -ra more <<< "${GRPO:-}"
py=${PYTHON:-.venv/bin/python}
torchrun=("$py" -m torch.distributed.run --standalone --nproc_per_node="$gpus")
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
plan="" # of a dry run: one line a command
dry=0
stages=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry=1 ;;
    data | index | distill | sft | grpo | infer | eval) stages+=("$argument") ;;
    *) echo "error: $argument is neither --dry-run nor one of the stages data, index, distill, sft, grpo, infer, eval" >&2; exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(data index distill sft grpo infer eval)

children=() server="" told=0
trap 'told=1; for child in "${children[@]}"; do kill -TERM "$child" 2> /dev/null || true; done' TERM
trap '[ -z "$server" ] || kill "$server" 2> /dev/null || true' EXIT

start() { # COMMAND...: in the background, or a line of the plan
  if [ $dry = 1 ]; then plan+="$stage"$'\t'"$(printf '%q ' "$@")"$'\n'; return; fi
  "$@" &
  children+=($!)
}
finish() { # waits for what was started; ends the script with the first status that is not 0
  local status=0 one child
  for child in "${children[@]}"; do
    while one=0; wait "$child" || one=$?; kill -0 "$child" 2> /dev/null; do :; done # a signal ends the wait, not the child
    [ $status != 0 ] || status=$one
  done
  children=()
  if [ $told = 1 ] && [ $status = 1 ]; then status=143; fi # torchrun ends with 1 when it is told to stop
  [ $status = 0 ] || exit $status
}
run() { start "$@"; finish; }
each_gpu() { # COMMAND... with the words PART (00, 01, ...) replaced: one process a GPU
  local i
  for ((i = 0; i < gpus; i++)); do
    CUDA_VISIBLE_DEVICES=$i start "${@//PART/$(printf '%02d' $i)}"
  done
  finish
}
split_lines() { # FILE FOLDER: FOLDER/00.json ..., as many as there are GPUs
  [ $dry = 1 ] && return
  mkdir -p "$2"
  split --number="l/$gpus" --numeric-suffixes --suffix-length=2 --additional-suffix=.json "$1" "$2/"
}
serve() { # starts the retrieval server unless one runs, and waits until it answers
  local name=${retriever}_$dataset command
  command=("$py" -m retriever_server --index_path "$name=$index" --port "$port")
  [ "$retriever" = bm25 ] || command+=(--model_name_or_path "$encoder")
  if [ $dry = 1 ]; then
    [ -n "$url" ] || { url=http://127.0.0.1:$port; start "${command[@]}"; }
    return
  fi
  if [ -z "$url" ]; then
    mkdir -p "$out"
    CUDA_VISIBLE_DEVICES="" "${command[@]}" --exit-with-parent $$ > "$out/server.log" 2>&1 &
    server=$! url=http://127.0.0.1:$port
  fi
  until curl -sf "$url/health" > /dev/null; do
    [ -z "$server" ] || kill -0 "$server" 2> /dev/null || { echo "error: the retrieval server ended, see $out/server.log" >&2; exit 2; }
    sleep 2
  done
}

stage_data() { run "$py" -m data_preprocess."$dataset" --input "${RAW:-data/raw/$dataset}" --output "$data"; }
stage_index() {
  if [ "$retriever" = bm25 ]; then
    run "$py" -m retriever_server.index bm25 --collection "$data/collection.jsonl" --output "$index" --k1 "$k1" --b "$b"
  else
    run "${torchrun[@]}" -m retriever_server.index dense --collection "$data/collection.jsonl" --model_name_or_path "$encoder" --output "$index"
  fi
}
stage_distill() { # the base model rewrites the training set with one worked example; rank 1 stays
  serve
  split_lines "$data/train.json" "$out/distill/in"
  each_gpu "$py" -m convsearch.distill --model_name_or_path "$base" --input_path "$out/distill/in/PART.json" --output_dir "$out/distill/PART" \
    --retriever_url "$url" --retriever_index "${retriever}_$dataset" --temperature 0.7 --device cuda --dtype bf16 --seed "$seed"
}
stage_sft() {
  local parts
  parts=$(printf "$out/distill/%02d/sft.parquet," $(seq 0 $((gpus - 1))))
  run "${torchrun[@]}" -m convsearch.sft experiment="$experiment" "data.train_files=[${parts%,}]" trainer.default_local_dir="$out/sft" trainer.seed="$seed"
}
stage_grpo() {
  serve
  run "$py" -m convsearch.grpo experiment="$experiment" data.train_files="$data/train.parquet" data.val_files="$data/validation.parquet" \
    actor_rollout_ref.model.path="$out/sft/model" retriever.url="$url" trainer.default_local_dir="$out/grpo" trainer.seed="$seed" \
    trainer.n_gpus_per_node="$gpus" trainer.nnodes="$nodes" "${more[@]}"
}
stage_infer() {
  split_lines "$data/$test.json" "$out/infer/in"
  each_gpu "$py" -m convsearch.infer --model_name_or_path "$out/grpo/model" --model_name ConvSearch-R1 --temperature 0.7 --device cuda --dtype bf16 \
    --seed "$seed" --input_path "$out/infer/in/PART.json" --output_path "$out/infer/PART.jsonl"
  [ $dry = 1 ] || cat "$out"/infer/[0-9]*.jsonl > "$out/rewrites.jsonl"
}
stage_eval() {
  local files=(--test_file_path "$out/rewrites.jsonl" --trec_gold_qrel_file_path "$data/$test.trec" --qrel_output_dir "$out" --output_trec_file run.trec)
  if [ "$retriever" = bm25 ]; then
    run "$py" -m eval.bm25 --index_dir_path "$index" "${files[@]}"
  else
    run "$py" -m eval.ance --passage_embeddings_dir_path "$index" --pretrained_encoder_path "$encoder" --n_gpu "$gpus" --test_type rewrite "${files[@]}"
  fi
  run "$py" -m eval.metrics --run "$out/run.trec" --qrels "$data/$test.trec"
}

for stage in "${stages[@]}"; do
  [ $dry = 1 ] || printf '\n== %s of %s (%(%H:%M:%S)T)\n' "$stage" "$experiment" -1
  "stage_$stage"
done
if [ $dry = 1 ]; then
  if [ "${PLAN:-}" = commands ]; then printf '%s' "$plan"; exit 0; fi
  printf '%s' "$plan" | "$py" -m convsearch.plan --name "$experiment" --gpus "$gpus" --nodes "$nodes" --gpu_gib "${GPU_GIB:-80}"
fi
