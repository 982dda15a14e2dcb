#!/usr/bin/env bash
# One experiment, from raw data to the table, in stages; the same on one CPU and on the GPUs of several nodes.
#   bash scripts/run.sh EXPERIMENT [--dry-run] [--device cpu|gpu] [STAGE ...] [GROUP=NAME ...] [KEY=VALUE ...]
#   EXPERIMENT   a file of configs/experiment/; names.runner in configs/grpo.yaml lists the keys that this script reads
#   STAGE        data index distill sft grpo infer eval report (default: all of the experiment); finished work is kept
#   GROUP=NAME   a file of configs/GROUP/, such as reward=ndcg3; the outputs go into a folder of their own
#   KEY=VALUE    keys of GRPO; the variable GRPO="KEY=VALUE ..." has more
#   --dry-run    checks the command of every stage, prints the plan (GPUs, memory, steps, disk) and starts nothing
# Variables, with their defaults:
#   SEED=1  QUICK=0 (1: a smoke run)  OUT=outputs/EXPERIMENT[_NAME][_quick][_seedN]  RAW=data/raw/DATA  PORT=0 (a free one)
#   GPUS (per node; on a CPU: processes)  NNODES=1 (scripts/multinode.sh)  GPU_GIB=80  PYTHON=.venv/bin/python
#   RETRIEVER_URL (a server with the index of the experiment; otherwise this script starts one)  ENCODER (of ANCE)
# SIGTERM: the running stage saves at the end of its step, and the status is 143. Status 3: training has collapsed.
set -feuo pipefail # -f: the lists of words in the configuration and in GRPO expand unquoted, without globs
cd "$(dirname "${BASH_SOURCE[0]}")/.."
experiment=${1:?give the name of an experiment: a file of configs/experiment/}
py=${PYTHON:-.venv/bin/python} seed=${SEED:-1} nodes=${NNODES:-1} port=${PORT:-0} url=""
dry=0 chosen="" cluster=() groups=() keys=(${GRPO:-}) plan=""
for ((i = 2; i <= $#; i++)); do
  case ${!i} in
    --dry-run) dry=1 ;;
    --device) ((++i)); cluster=("cluster=${!i/gpu/gpu8}") ;;
    data | index | distill | sft | grpo | infer | eval | report) chosen+=" ${!i}" ;;
    *.*=*) keys+=("${!i}") ;;
    *=*) groups+=("${!i}") ;;
    *) echo "error: ${!i} is neither --dry-run, --device, GROUP=NAME, KEY=VALUE nor one of the stages" \
      "data, index, distill, sft, grpo, infer, eval, report" >&2; exit 2 ;;
  esac
done
variables=$("$py" -m convsearch.plan --variables "experiment=$experiment" "${cluster[@]}" "${groups[@]}")
eval "$variables" # base, index_name, and every key of names.runner: stages, device, processes, data, ...
composed=(experiment="$experiment" "${cluster[@]}" "${groups[@]}" trainer.seed="$seed")

name=$experiment
for group in "${groups[@]}"; do name+=_${group#*=}; done
[ "${QUICK:-0}" = 0 ] || name+=_quick
[ "$seed" = 1 ] || name+=_seed$seed
out=${OUT:-outputs/$name} processes=${GPUS:-$processes} kind=${index%% *}
raw=${raw:+${RAW:-$raw}} encoder=${encoder:+${ENCODER:-$encoder}}
if [ -z "${BRIGHT:-}" ] && [ $dry = 0 ]; then bright=""; fi
bright_folder=${BRIGHT:-BRIGHT}
index_folder=data/indexes/$index_name
sft_model=$out/sft/model
[ "$rounds" = 1 ] || sft_model=$out/sft$rounds/model # of the last round
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if [ "$device" = cpu ]; then
  # Every step allocates and frees gigabytes of activations: keep the memory, in huge pages (1.7 times faster here).
  export HF_HUB_OFFLINE=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
  export MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_THRESHOLD_=17179869184
else
  keys=(${GPUS:+trainer.n_gpus_per_node="$GPUS"} ${NNODES:+trainer.nnodes="$NNODES"} "${keys[@]}")
fi
ranks=("$py") # of a command that shares its work by itself
[ "$processes" = 1 ] || ranks+=(-m torch.distributed.run --standalone --nproc_per_node="$processes")
# Flags that distill, infer and, with dashes, data_preprocess share.
prompt="${style:+--prompt_style $style} ${history_turns:+--max_history_turns $history_turns}"
sft_keys=()
if [ "${QUICK:-0}" != 0 ]; then
  [ "$device" = cpu ] && batch=2 || batch=$((2 * processes * nodes))
  distill_size="--k 2 --limit 24 --rank_limit 100" # few samples reach rank 1, fewer after two steps of SFT
  distill2+=" --scaffold --max_tokens 128 $distill_size" infer+=" --max_tokens 48" test_questions=16
  sft_keys=(trainer.total_training_steps=2 data.train_batch_size=$((4 * processes)) data.micro_batch_size_per_gpu=4)
  keys=(trainer.total_training_steps=2 data.train_batch_size=$batch actor_rollout_ref.actor.ppo_mini_batch_size=$batch
    data.val_max_samples=8 "${keys[@]}")
  for name in previous_question previous_answer history zero_shot grpo_sample; do runs=${runs/ $name/}; done
fi

children=() server="" terminated=0
trap 'terminated=1; for child in "${children[@]}"; do kill -TERM "$child" 2> /dev/null || true; done' TERM
trap '[ -z "$server" ] || kill "$server" 2> /dev/null || true' EXIT

start() { # COMMAND...: in the background, or a line of the plan
  [ $terminated = 0 ] || return 0
  if [ $dry = 1 ]; then plan+="$stage"$'\t'"$(printf '%q ' "$@")"$'\n'; return; fi
  "$@" &
  children+=($!)
}
finish() { # waits for what was started; ends the script with the first status that is not 0
  local status=0 one child
  for child in "${children[@]}"; do
    # A signal ends the wait, not the child.
    while one=0; wait "$child" || one=$?; kill -0 "$child" 2> /dev/null; do :; done
    [ $status != 0 ] || status=$one
  done
  children=()
  if [ $terminated = 1 ] && [ $status -le 1 ]; then status=143; fi # torchrun ends with 1 after SIGTERM
  [ $status = 0 ] || exit $status
}
run() { start "$@"; finish; }
each_process() { # FILE RESULT COMMAND...: INPUT and OUTPUT become FILE and RESULT, or the share of each process
  local input=$1 output=$2 command i
  if [ $dry = 0 ] && [ "$processes" != 1 ]; then
    mkdir -p "$2.parts"
    split --number="l/$processes" --numeric-suffixes --suffix-length=2 --additional-suffix=.json "$1" "$2.parts/"
  fi
  for ((i = 0; i < processes; i++)); do
    if [ "$processes" != 1 ]; then output=$2.parts/$(printf '%02d' $i) input=$2.parts/$(printf '%02d' $i).json; fi
    command=("${@:3}")
    command=("${command[@]/#INPUT/"$input"}")
    CUDA_VISIBLE_DEVICES=$i start "${command[@]/#OUTPUT/"$output"}"
  done
  finish
}
parts() { # RESULT [SUFFIX] [SEPARATOR]: what each process wrote, in order
  seq -f "$1.parts/%02g${2:-}" -s "${3:- }" 0 $((processes - 1))
}
serve() { # sets url; starts the retrieval server if the experiment has one and RETRIEVER_URL is not set
  [ -z "$url" ] || return 0
  if [ "$served" = false ]; then url=embedded:$index_folder; return; fi
  url=${RETRIEVER_URL:-}
  if [ -z "$url" ]; then
    local command=("$py" -m retriever_server --index_path "$index_name=$index_folder" --port "$port")
    [ -z "$encoder" ] || command+=(--model_name_or_path "$encoder")
    if [ $dry = 1 ]; then url=http://127.0.0.1:$port; start "${command[@]}"; return; fi
    mkdir -p "$out"
    CUDA_VISIBLE_DEVICES="" "${command[@]}" --exit-with-parent $$ > "$out/server.log" 2>&1 &
    server=$!
    until url=$(sed -n 's|^retriever_server: \(http://[^ ]*\) ready.*|\1|p' "$out/server.log") && [ -n "$url" ]; do
      kill -0 "$server" 2> /dev/null || { echo "error: the retrieval server ended, see $out/server.log" >&2; exit 2; }
      sleep 1
    done
  fi
}

stage_data() {
  local input=() file
  for file in $raw_files; do input+=("$raw/$file"); done
  [ -z "$raw" ] || [ -n "$raw_files" ] || input=("$raw")
  run "$py" -m data_preprocess.$prepare ${prompt//_/-} ${input:+--input "${input[@]}"} --output "$data"
  [ -z "$fetch" ] || run "$py" -m data_preprocess."$fetch" --output "$base"
}
stage_index() {
  local command=("${ranks[@]}")
  [ "$kind" != bm25 ] || command=("$py")
  run "${command[@]}" -m retriever_server.index $index ${encoder:+--model_name_or_path "$encoder"} \
    --collection "$data/collection.jsonl" --output "$index_folder"
}
sample() { # MODEL FOLDER FLAGS...: the model rewrites the training set; rewrites that reach rank 1 stay
  serve
  local named=""
  [ "$served" = false ] || named="--retriever_index $index_name"
  each_process "$data/train.json" "$2" "$py" -m convsearch.distill --model_name_or_path "$1" --input_path INPUT \
    --output_dir OUTPUT --retriever_url "$url" --seed "$seed" $generation $prompt $named "${@:3}"
}
learn() { # FOLDER RUN: the base model learns from what is in the folder
  local files=$1/sft.parquet
  [ "$processes" = 1 ] || files=[$(parts "$1" /sft.parquet ,)]
  run "${ranks[@]}" -m convsearch.sft "${composed[@]}" data.train_files="$files" trainer.default_local_dir="$2" \
    "${sft_keys[@]}"
}
stage_distill() { sample "$base" "$out/distill" $distill $distill_size; } # with one worked example
stage_sft() { # further rounds: what the last SFT model writes, with the prompt of GRPO, is learned by the base model
  local round before=""
  learn "$out/distill" "$out/sft"
  for ((round = 2; round <= rounds; round++)); do
    sample "$out/sft$before/model" "$out/distill$round" --model_name ConvSearch-R1 $distill2
    learn "$out/distill$round" "$out/sft$round"
    before=$round
  done
}
stage_grpo() {
  serve
  local more=(data.train_files="$data/train.parquet" data.val_files="$data/validation.parquet")
  [[ " $stages " != *" sft "* ]] || more+=(actor_rollout_ref.model.path="$sft_model")
  run "$py" -m convsearch.grpo "${composed[@]}" "${more[@]}" retriever.url="$url" \
    trainer.default_local_dir="$out/grpo" "${keys[@]}"
}
rewrite() { # FILE RESULT MODEL FLAGS
  each_process "$1" "$2" "$py" -m convsearch.infer --model_name_or_path "$3" --input_path INPUT --output_path OUTPUT \
    --seed "$seed" $generation $prompt $infer $4
  [ $dry = 1 ] || [ "$processes" = 1 ] || cat $(parts "$2") > "$2"
}
# What is searched: a text of the test file, or the rewrites of a model. eval/systems.py has the names of the table.
declare -A text=([raw]=question [previous_question]=previous_question [previous_answer]=previous_answer
  [previous]=previous [history]=all_history [written]=rewrite)
declare -A model=([zero_shot]=$base [sft]=$sft_model [grpo]=$out/grpo/model
  [grpo_sample]=$out/grpo/model [grpo_fused]=$out/grpo/model)
declare -A sampling=([grpo_sample]="--temperature 0.7 --n 4" [grpo_fused]="--temperature 0.7 --n 4")
declare -A shared=([grpo_sample]=grpo_samples [grpo_fused]=grpo_samples) # the first of the four, and all of them fused
declare -A fusion=([grpo_fused]="--fuse rrf")
rules="" # the constant rules among the runs, if the best of them is asked for
if [[ " $runs " == *" constant "* ]]; then
  runs=${runs/constant/}
  for name in $runs; do [ "${text[$name]:-rewrite}" = rewrite ] || rules+=" $name"; done
fi
stage_infer() {
  local name
  for name in $bright; do
    rewrite "$bright_folder/$name/topics.jsonl" "$out/reasoned/$name.jsonl" "$out/grpo/model" ""
  done
  [ -n "$runs" ] || return 0
  run "$py" -m data_preprocess.subset --input "$data/$test.json" --qrels "$data/$test.trec" \
    ${test_questions:+--limit "$test_questions"} --output "$out"
  [ -z "$rules" ] || run "$py" -m data_preprocess.subset --input "$data/validation.json" \
    --qrels "$data/validation.trec" --name validation --output "$out"
  for name in $runs; do
    [ -z "${model[$name]:-}" ] ||
      rewrite "$out/test.json" "$out/${shared[$name]:-$name}.jsonl" "${model[$name]}" "${sampling[$name]:-}"
  done
}
search() { # NAME FILE QRELS FOLDER: writes FOLDER/NAME.trec
  run "$py" -m "${searcher[@]}" --test_file_path "$2" --test_type "${text[$1]:-rewrite}" ${fusion[$1]:-} \
    --trec_gold_qrel_file_path "$3" --qrel_output_dir "$4" --output_trec_file "$1.trec"
}
stage_eval() {
  local name file searcher=(eval.ance --passage_embeddings_dir_path "$index_folder" --n_gpu "$processes")
  [ -z "$encoder" ] || searcher+=(--pretrained_encoder_path "$encoder")
  [ "$kind" != bm25 ] || searcher=(eval.bm25 --index_dir_path "$index_folder")
  for name in $runs; do
    file=$out/${shared[$name]:-$name}.jsonl
    [ -z "${text[$name]:-}" ] || file=$out/test.json
    search "$name" "$file" "$out/test.trec" "$out"
  done
  for name in $rules; do search "$name" "$out/validation.json" "$out/validation.trec" "$out/validation"; done
  [ -z "$bright" ] || run "$py" -m eval.bright --task all --documents "$bright_folder/{task}/collection.jsonl" \
    --topics "$bright_folder/{task}/topics.jsonl" --qrels "$bright_folder/{task}/qrels.trec" \
    --queries "$out/reasoned/{task}.jsonl" --bm25 query-weighted
}
stage_report() {
  local name table=() validation=()
  run "$py" -m convsearch.plots "$out/grpo" --output "$out/curves.png"
  for name in $runs; do
    table+=("$out/$name.trec")
    [ -z "${model[$name]:-}" ] || table[-1]+=@$out/${shared[$name]:-$name}.jsonl
    [ "$name" != written ] || table[-1]+=@$out/test.json
  done
  for name in $rules; do validation+=("$out/validation/$name.trec"); done
  [ -z "$runs" ] || run "$py" -m eval.summary --qrels "$out/test.trec" --output "$out/results.json" "${table[@]}" \
    ${rules:+--rules "$out/validation.trec" "${validation[@]}"}
}

for stage in ${chosen:-$stages}; do
  [ $dry = 1 ] || printf '\n== %s of %s, seed %s (%(%H:%M:%S)T)\n' "$stage" "$experiment" "$seed" -1
  stage_"$stage"
done
if [ "${PLAN:-}" = commands ]; then printf '%s' "$plan"; exit 0; fi
[ $dry = 0 ] || printf '%s' "$plan" |
  "$py" -m convsearch.plan --name "$experiment" --gpus "$processes" --nodes "$nodes" --gpu_gib "${GPU_GIB:-80}"
