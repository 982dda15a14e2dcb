"""Configuration: the original command lines, every file under configs/, and the error for each mistake.

1. The SFT and GRPO command lines of the original README are accepted unchanged; each override sets its value.
2. A configuration holds plain, frozen values; a later override wins; ${...} refers to the command's own keys.
3. A mistake is one sentence that names the key, and the known key nearest to it or the two numbers that clash.
4. A key without effect says so in the help and warns when it is set.
5. The help needs no torch and shows every key (test_help.py holds it to a second).
"""

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
from pydantic import BaseModel, ValidationError

from convsearch.config import GrpoConfig, SftConfig, config_dir, help_text, load_grpo_config, load_sft_config

ROOT = Path(__file__).resolve().parents[1]
SEED_README = ROOT.parent / "shared" / "reference" / "convsearch-r1-readme.md"
LOADERS = {"sft": load_sft_config, "grpo": load_grpo_config}
FILES = sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml"))
CPU = ["experiment=mtrag_smollm2"]

SFT_BLOCK = """\
nproc_per_node=8
save_path=ckpt/sft/qrecc/llama3.2-3b-it_self
export WANDB_API_KEY="your_wandb_key"
HOME=path/to/your/work/home

torchrun --standalone --nnodes=1 --nproc_per_node=$nproc_per_node \\
     -m verl.trainer.fsdp_sft_trainer \\
    data.train_files=$HOME/data/qrecc/sft/train_llama3.2-3b-it_self.parquet \\
    data.val_files=$HOME/data/qrecc/sft/test_llama3.2-3b-it_self.parquet \\
    data.prompt_key=extra_info \\
    data.response_key=extra_info \\
    +data.prompt_dict_keys=['prompt'] \\
    +data.response_dict_keys=['answer'] \\
    data.train_batch_size=64 \\
    data.micro_batch_size_per_gpu=8 \\
    data.max_length=3072 \\
    data.truncation=right \\
    model.partial_pretrain=path/to/your/model \\
    model.enable_gradient_checkpointing=True \\
    trainer.default_local_dir=$save_path \\
    trainer.project_name=llama3.2-3b-it_qrecc-sft \\
    trainer.experiment_name=llama3.2-3b-it_self_epoch2 \\
    trainer.total_epochs=2 \\
    trainer.logger=['wandb'] \\
    trainer.default_hdfs_dir=null
"""
GRPO_BLOCK = """\
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export VLLM_ATTENTION_BACKEND=XFORMERS
export WANDB_API_KEY="your_wandb_key"
DATE=$(date "+%y%m%d%H%M")
HOME=path/to/your/work/home

PROJECT_NAME=verl_grpo_rewrite_qrecc
EXPERIMENT_NAME=llama3.2_3b_it_self_bs128_maxlen1024_lr1e-6_warmup100_n8_temp0.7_epoch9_r9_v3
export RETRIEVER_URL="your_retrieval_server_url"


python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$HOME/data/qrecc/train_v3.parquet \\
    data.val_files=$HOME/data/qrecc/test_v3.parquet \\
    data.train_batch_size=128 \\
    data.max_prompt_length=1536 \\
    data.max_response_length=1024 \\
    data.filter_overlong_prompts=True \\
    data.truncation='error' \\
    actor_rollout_ref.model.path=path/to/your/sft/model \\
    actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.actor.optim.lr_warmup_steps=100 \\
    actor_rollout_ref.model.use_remove_padding=True \\
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.001 \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \\
    actor_rollout_ref.model.enable_gradient_checkpointing=True \\
    actor_rollout_ref.actor.fsdp_config.param_offload=False \\
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=False \\
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32 \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \\
    actor_rollout_ref.rollout.name=vllm \\
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \\
    actor_rollout_ref.rollout.n=8 \\
    actor_rollout_ref.rollout.temperature=0.7 \\
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32 \\
    actor_rollout_ref.ref.fsdp_config.param_offload=True \\
    algorithm.kl_ctrl.kl_coef=0.001 \\
    trainer.critic_warmup=0 \\
    trainer.logger=['wandb'] \\
    trainer.project_name=$PROJECT_NAME \\
    trainer.experiment_name=$EXPERIMENT_NAME \\
    trainer.n_gpus_per_node=8 \\
    trainer.nnodes=1 \\
    trainer.save_freq=100 \\
    trainer.test_freq=-1 \\
    trainer.default_local_dir=ckpt/qrecc/dense/$EXPERIMENT_NAME \\
    trainer.total_epochs=9 \\
    reward_model.reward_manager=rewrite_r1 \\
    custom_reward_function.path=verl/verl/utils/reward_score/rewrite_r1.py \\
    retriever.topk=100 $@ 2>&1 | tee logs/${DATE}_${EXPERIMENT_NAME}.log
"""


def overrides(block: str, extras: str = "") -> list[str]:
    """The overrides that a shell would hand to the module which ``block`` starts; ``extras`` stand for its $@."""
    variables = dict(re.findall(r"^(?:export )?(\w+)=(\S*)$", block, flags=re.MULTILINE))
    command = block[block.index("-m verl.") :].replace("\\\n", " ").split("2>&1")[0].replace("$@", extras)
    return shlex.split(Template(command).safe_substitute(variables))[2:]


def value_at(config: BaseModel, key: str) -> object:
    node: object = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def message(kind: str, *argv: str) -> str:
    """The one-line message with which ``argv`` is refused."""
    with pytest.raises(ValueError) as caught:
        LOADERS[kind](list(argv))
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keys_of(kind: str) -> list[str]:
    return re.findall(r"^  ([a-z_]+\.[a-z_.]+)=", help_text(kind), flags=re.MULTILINE)


# 1. The seed's command lines


@pytest.mark.skipif(not SEED_README.exists(), reason="the seed's README is not there")
def test_the_blocks_above_equal_the_original_readme():
    readme = SEED_README.read_text(encoding="utf-8")
    for block in (SFT_BLOCK, GRPO_BLOCK):
        assert block in readme


@pytest.mark.parametrize(("kind", "block", "count"), [("sft", SFT_BLOCK, 18), ("grpo", GRPO_BLOCK, 42)])
def test_original_overrides_set_their_values(kind, block, count):
    lines = overrides(block)
    assert len(lines) == count
    config = LOADERS[kind](lines)
    for line in lines:
        key, text = line.lstrip("+").split("=", 1)
        value = value_at(config, key)
        if isinstance(value, tuple):
            assert text in ("[" + ",".join(value) + "]", ",".join(value))
        elif isinstance(value, float):
            assert value == float(text)
        else:
            assert str(value).replace("None", "null") == text


def test_original_values_keep_their_types():
    sft, grpo = load_sft_config(overrides(SFT_BLOCK)), load_grpo_config(overrides(GRPO_BLOCK))
    assert sft.data.prompt_dict_keys == ("prompt",)
    assert sft.trainer.default_local_dir == "ckpt/sft/qrecc/llama3.2-3b-it_self"
    assert sft.trainer.default_hdfs_dir is None
    assert sft.model.enable_gradient_checkpointing is True
    assert grpo.actor_rollout_ref.actor.optim.lr == 1e-6
    assert grpo.data.train_files == ("path/to/your/work/home/data/qrecc/train_v3.parquet",)
    assert grpo.trainer.logger == ("wandb",)
    assert grpo.trainer.test_freq == -1


def test_extra_arguments_override_the_script():
    config = load_grpo_config(
        overrides(GRPO_BLOCK, extras="actor_rollout_ref.rollout.n=16 retriever.url=http://127.0.0.1:8000")
    )
    assert config.actor_rollout_ref.rollout.n == 16
    assert config.retriever.resolved_url() == "http://127.0.0.1:8000"


def test_defaults_equal_the_paper():
    sft, grpo = (
        load_sft_config(["experiment=paper_qrecc_llama_ance"]),
        load_grpo_config(["experiment=paper_qrecc_llama_ance"]),
    )
    seed_sft, seed_grpo = load_sft_config(overrides(SFT_BLOCK)), load_grpo_config(overrides(GRPO_BLOCK))
    assert sft.optim == seed_sft.optim
    assert (sft.optim.lr, sft.optim.betas, sft.optim.weight_decay, sft.optim.warmup_steps_ratio) == (
        1e-5,
        (0.9, 0.95),
        0.01,
        0.1,
    )
    seed_actor = seed_grpo.actor_rollout_ref.actor.model_copy(
        update={"entropy_coeff": 0.001}
    )  # its trainer's default, not in its command line
    assert grpo.actor_rollout_ref.actor == seed_actor
    assert grpo.actor_rollout_ref.rollout == seed_grpo.actor_rollout_ref.rollout
    assert grpo.reward_model == seed_grpo.reward_model
    assert grpo.trainer.total_epochs == 9
    assert load_grpo_config(["experiment=paper_topiocqa_qwen_bm25"]).trainer.total_epochs == 6


# 2. Files, references and precedence


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_parses(kind, file):
    argv = [
        "data.train_files=a.parquet",
        "model.partial_pretrain=m" if kind == "sft" else "actor_rollout_ref.model.path=m",
    ]
    if len(file.parts) > 1:
        argv = [f"{file.parts[0]}={file.stem}"] + ([] if file.parts[0] == "experiment" else CPU)
    if kind == "sft" and (file.stem.startswith("rqr_") or file.stem == "stackexchange"):
        argv.append("data.train_files=a.parquet")  # RQR has no warm-up, and its files name no rows for one
    config = LOADERS[kind](argv)
    assert isinstance(config, SftConfig if kind == "sft" else GrpoConfig)


def test_a_later_choice_overrides_an_earlier_one():
    assert load_grpo_config(CPU).reward_model.reward.name == "rank_incentive"
    assert load_grpo_config([*CPU, "reward=ndcg3"]).reward_model.reward.name == "ndcg@3"
    assert load_grpo_config(["+reward=mrr", "+experiment=mtrag_smollm2"]).reward_model.reward.name == "mrr"
    assert load_grpo_config([*CPU, "cluster=gpu8", "trainer.device=cpu"]).trainer.device == "cpu"


def test_one_experiment_file_serves_both_stages():
    sft, grpo = load_sft_config(CPU), load_grpo_config(CPU)
    assert sft.data.train_files == ("data/mtrag/sft/train_smollm2-135m.parquet",)
    assert grpo.data.train_files == ("data/mtrag/train.parquet",)
    assert grpo.actor_rollout_ref.model.path == f"{sft.trainer.default_local_dir}/model"
    assert grpo.retriever.url == "embedded:data/indexes/bm25_mtrag"
    assert grpo.actor_rollout_ref.rollout.name == "hf"


def test_references_follow_the_overrides():
    config = load_grpo_config(
        [*CPU, "trainer.seed=7", "trainer.default_local_dir=x/${trainer.experiment_name}/${trainer.seed}"]
    )
    assert (config.trainer.seed, config.data.seed, config.actor_rollout_ref.rollout.seed) == (7, 7, 7)
    assert config.trainer.default_local_dir == "x/mtrag_smollm2/7"
    assert load_grpo_config([*CPU, "trainer.seed=7", "data.seed=1"]).data.seed == 1


def test_files_may_be_a_list_and_names_may_be_numbers():
    config = load_sft_config(
        [*CPU, "data.train_files=[a.parquet,b.parquet]", "trainer.experiment_name=7", "data.val_files=null"]
    )
    assert config.data.train_files == ("a.parquet", "b.parquet")
    assert config.trainer.experiment_name == "7"
    assert config.data.val_files == ()


def test_values_are_frozen_and_plain():
    config = load_grpo_config(CPU)
    with pytest.raises(ValidationError):
        config.trainer.seed = 2
    assert GrpoConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert "omegaconf" not in repr([type(value) for _, value in config])


def test_retriever_url_falls_back_to_the_environment(monkeypatch):
    retriever = load_grpo_config([*CPU, "retriever.url=''"]).retriever
    monkeypatch.setenv("RETRIEVER_URL", "http://127.0.0.1:9")
    assert retriever.resolved_url() == "http://127.0.0.1:9"
    monkeypatch.delenv("RETRIEVER_URL")
    with pytest.raises(ValueError, match="RETRIEVER_URL is not set"):
        retriever.resolved_url()


# 3. Mistakes


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_misspelt_key_names_the_nearest_key(kind):
    keys = [key for key in keys_of(kind) if len(key.rsplit(".", 1)[-1]) > 3]
    for key in keys:
        wrong = key[:-2] + key[-1]
        if wrong not in keys:
            assert f"unknown key '{wrong}': the nearest known key is '{key}'" in message(kind, *CPU, f"{wrong}=1")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["data.train_batch_size=9"], ["data.train_batch_size=9", "ppo_mini_batch_size=14"]),
        (["data.max_response_length=9000"], ["=896", "=9768"]),
        (["trainer.n_gpus_per_node=3"], ["=56", "=3"]),
        (
            ["algorithm.loss_agg=micro-batch-mean", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=9"],
            ["=56", "=9"],
        ),
        (
            ["actor_rollout_ref.rollout.tensor_model_parallel_size=2"],
            ["n_gpus_per_node=1", "tensor_model_parallel_size=2"],
        ),
        (["actor_rollout_ref.actor.clip_ratio_high=0.1"], ["clip_ratio_high=0.1", "clip_ratio=0.2"]),
        (["actor_rollout_ref.actor.llds_coef=0.2"], ["llds_coef=0.2", "ppo_mini_batch_size=14", "set ppo_epochs=2"]),
        (
            ["actor_rollout_ref.actor.use_kl_loss=false", "algorithm.kl_ctrl.kl_coef=0.5"],
            ["kl_coef=0.5", "use_kl_loss"],
        ),
        (["data.train_batch_size=abc"], ["data.train_batch_size='abc'", "integer"]),
        (["data.train_batch_size=true"], ["data.train_batch_size=True", "integer"]),
        (["data.shuffle=1"], ["data.shuffle=1", "boolean"]),
        (["actor_rollout_ref.rollout.temperature=0"], ["temperature=0", "greater than 0"]),
        (["actor_rollout_ref.rollout.n=1"], ["rollout.n=1", "2"]),
        (["actor_rollout_ref.rollout.n_train=17"], ["n_train=17", "n=8"]),
        (["trainer.critic_warmup=5"], ["trainer.critic_warmup=5"]),
        (["trainer.best_metric=val_loss"], ["trainer.best_metric=val_loss", "val_mrr, val_reward"]),
        (["trainer.best_metric=val_mrr", "trainer.test_freq=-1"], ["best_metric=val_mrr", "test_freq=-1"]),
        (["trainer.best_metric=val_mrr", "data.val_files=[]"], ["best_metric=val_mrr", "data.val_files=[]"]),
        (["trainer.save_freq=0"], ["trainer.save_freq", "-1"]),
        (["trainer.logger=[mlflow]"], ["mlflow", "jsonl"]),
        (["trainer.default_hdfs_dir=hdfs://x"], ["trainer.default_hdfs_dir", "hdfs://x", "null"]),
        (["custom_reward_function.path=my_reward.py"], ["my_reward.py", "reward_model.reward.name"]),
        (["custom_reward_function.name=mine"], ["custom_reward_function.name", "mine"]),
        (["data.train_files=null"], ["data.train_files is not set"]),
        (["trainer=3"], ["trainer=3", "trainer.logger"]),
        (["trainer={sed: 3}"], ["unknown key 'trainer.sed'", "'trainer.seed'"]),
        (["experiment=demo"], ["configs/experiment/demo.yaml", "demo_smollm2"]),
        (["trainer.experiment_name=${trainer.nothing}"], ["trainer.nothing"]),
        (["data.seed"], ["'data.seed' is not KEY=VALUE"]),
        (["~data.seed"], ["~data.seed"]),
        (["data.seed=1,2"], ["data.seed=1,2"]),
        (["--multirun"], ["--multirun"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence_that_names_it(argv, parts):
    text = message("grpo", *CPU, *argv)
    for part in parts:
        assert part in text


def test_missing_required_keys_are_named():
    assert "data.train_files is not set" in message("sft")
    assert "model.partial_pretrain is not set" in message("sft", "data.train_files=a.parquet")
    assert "actor_rollout_ref.model.path is not set" in message("grpo", "data.train_files=a.parquet")


def test_sft_batches_must_divide():
    text = message("sft", *CPU, "data.train_batch_size=19")
    assert "data.train_batch_size=19" in text
    assert "micro_batch_size_per_gpu=2" in text
    config = load_sft_config([*CPU, "data.train_batch_size=16", "data.micro_batch_size_per_gpu=4"])
    config.check_world(2)
    with pytest.raises(ValueError, match=r"=16 .*=3"):
        config.check_world(3)
    with pytest.raises(ValueError, match=r"=2 .*=4"):
        config.check_world(8)


def test_lengths_above_the_models_positions_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    text = message("grpo", *CPU, f"actor_rollout_ref.model.path={tmp_path}")
    assert "max_response_length=824" in text
    assert "512" in text
    text = message("sft", *CPU, f"model.partial_pretrain={tmp_path}")
    assert "data.max_length=896" in text
    load_sft_config([*CPU, f"model.partial_pretrain={tmp_path}", "data.max_length=512"])
    (tmp_path / "config.json").write_text('{"max_position')
    assert "config.json is damaged" in message("sft", *CPU, f"model.partial_pretrain={tmp_path}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("grpo:\n  trainer:\n    sed: 1\n", "unknown key 'trainer.sed': the nearest known key is 'trainer.seed'"),
        ("trainer:\n  seed: 1\n", "has 'trainer: {'seed': 1}' at its top: only sft, grpo and names"),
        ("grpo: [\n", "cannot be composed"),
    ],
)
def test_a_faulty_file_names_its_fault(tmp_path, monkeypatch, text, part):
    for file in FILES:
        copy = tmp_path / file
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((config_dir() / file).read_text())
    (tmp_path / "reward" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    monkeypatch.setattr("convsearch.config.load.config_dir", lambda: tmp_path)
    assert part in message("grpo", *CPU, "reward=mine")


# 4. Keys without effect

WITHOUT_EFFECT = {
    "trainer.default_hdfs_dir": "null",
    "algorithm.name": "grpo",
    "algorithm.adv_estimator": "grpo",
    "algorithm.kl_ctrl.kl_coef": "0.001",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "16",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": "16",
    "reward_model.reward_manager": "rewrite_r1",
    "custom_reward_function.path": "verl/verl/utils/reward_score/rewrite_r1.py",
    "custom_reward_function.name": "compute_score",
    "trainer.critic_warmup": "0",
}


def test_keys_without_effect_say_so_in_the_help():
    lines = help_text("grpo").splitlines()
    found = [line for line, below in itertools.pairwise(lines) if below.startswith("      accepted, without effect: ")]
    assert {line.strip().partition("=")[0] for line in found} == set(WITHOUT_EFFECT)


@pytest.mark.parametrize(("key", "value"), WITHOUT_EFFECT.items())
def test_a_key_without_effect_warns_when_it_is_set(key, value, capsys, monkeypatch):
    with_kl = [*CPU, "actor_rollout_ref.actor.use_kl_loss=true"]  # kl_coef needs it
    load_grpo_config([*with_kl, f"+{key}={value}", "trainer.seed=2"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {key}={value} is accepted, without effect: ")
    monkeypatch.setenv("RANK", "1")
    load_grpo_config([*with_kl, f"{key}={value}"])
    assert capsys.readouterr().err == ""


def test_no_warning_without_such_a_key(capsys):
    load_grpo_config(CPU)
    load_sft_config(CPU)
    assert capsys.readouterr().err == ""
    load_sft_config([*CPU, "trainer.default_hdfs_dir=null"])
    assert capsys.readouterr().err.count("\n") == 1


# 5. The help


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_help_imports_no_heavy_module(kind):
    code = f"""
import sys
from convsearch.config import load_{kind}_config
try:
    load_{kind}_config(["--help"])
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "transformers", "pandas", "numpy", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "data.train_files=required  [list of str]" in done.stdout


def test_help_shows_every_key_with_its_meaning_and_value():
    text = help_text("grpo")
    assert "  actor_rollout_ref.actor.clip_ratio=0.2  [float]\n      the policy ratio" in text
    assert "  trainer.total_training_steps=null  [int|null]\n" in text
    assert "  actor_rollout_ref.actor.optim.betas=[0.9,0.999]  [[float, float]]\n" in text
    assert "  trainer.logger=[console,jsonl]  [list of console|jsonl|wandb|tensorboard]\n" in text
    assert "  data.max_response_length=56  [int]" in help_text("grpo", CPU)
    for kind in ("sft", "grpo"):
        lines = help_text(kind).splitlines()
        described = [below for line, below in itertools.pairwise(lines) if re.match(r"  [a-z_]+\.", line)]
        assert len(described) == len(keys_of(kind))
        assert all(len(below.strip()) > 5 and "None" not in below for below in described)


# 6. RQR's presets


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_rqr_presets_equal_the_paper(size):
    config = load_grpo_config([f"experiment=rqr_qwen2.5-{size}"])
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    optim = actor.optim
    assert (optim.lr, optim.lr_scheduler, optim.min_lr_ratio, optim.betas, optim.weight_decay) == (
        1e-6,
        "cosine",
        0.1,
        (0.9, 0.99),
        0.1,
    )
    assert (config.trainer.total_training_steps, optim.lr_warmup_steps) == (150, 15)
    assert (
        config.data.train_batch_size,
        rollout.n,
        config.data.max_prompt_length,
        config.data.max_response_length,
    ) == (12, 16, 8000, 500)
    assert (actor.kl_loss_coef, actor.grad_clip, actor.use_kl_loss) == (0.008, 0.1, True)
    reward = config.reward_model.reward
    assert (reward.weights, reward.form, reward.format_penalty) == ((0.0, 1.0), "text", -1.0)
    assert config.retriever.similarity_model == "BAAI/bge-base-en-v1.5"


@pytest.mark.parametrize("experiment", ["rqr_qwen2.5-1.5b", "rqr_qwen2.5-7b", "rqr_smollm2"])
def test_dry_run_shows_the_whole_configuration_and_starts_nothing(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        load_grpo_config([f"experiment={experiment}", "--dry-run", "trainer.seed=3"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert {"trainer.seed=3", "reward_model.reward.name=similarity_gain", "data.seed=3"} <= set(out.splitlines())
    assert len(out.splitlines()) == len(keys_of("grpo")) + 1
    assert list(tmp_path.iterdir()) == []


def test_a_mix_has_both_weights_and_zero_weights_are_refused():
    assert load_grpo_config([*CPU, "reward=mixed"]).reward_model.reward.weights == (1.0, 0.5)
    assert "leave no reward" in message("grpo", *CPU, "reward_model.reward.rank_weight=0")
