"""The configuration of the RL stage (``python -m convsearch.grpo``), with the keys of the original ``main_ppo``.

Defaults are the paper's for 8 GPUs without the entropy bonus. The paper does not mention the bonus, but it was on by
default in the paper's trainer, so ``algorithm=grpo_faithful`` (which the paper's experiments choose) turns it on.
"""

import os
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from convsearch.config.base import (
    NO_EFFECT,
    Betas,
    CountOrMinusOne,
    Dtype,
    Section,
    Text,
    Texts,
    TrainerSection,
    key,
    require_fit,
    require_multiple,
)
from convsearch.config.guard import GuardConfig

EMBEDDED = "embedded:"
RewardName = Literal["rank_incentive", "reciprocal", "exponential", "curriculum", "mrr", "ndcg@3", "similarity_gain"]
SEED_REWARD_FILE = "reward_score/rewrite_r1.py"


class KlCtrlConfig(Section):
    kl_coef: float = key(0.0, f"{NO_EFFECT}the KL is in the loss (use_kl_loss), not in the reward", ge=0)


class FilterGroupsConfig(Section):
    enable: bool = key(False, "DAPO's dynamic sampling: other prompts for groups whose rewards are all equal")
    max_num_gen_batches: int = key(
        10, "largest number of draws per step; equal groups are left out of the update and its mean", ge=1
    )


class RolloutCorrectionConfig(Section):
    rollout_is: Literal["token", "sequence"] | None = key(
        None, "importance weight of policy against sampler, per token or per sequence; null: none"
    )
    rollout_is_threshold: float = key(2.0, "larger importance weights are truncated to this", gt=0)


class AlgorithmConfig(Section):
    name: Literal["grpo"] = key("grpo", f"{NO_EFFECT}there is one step function")
    adv_estimator: Literal["grpo"] = key("grpo", f"{NO_EFFECT}the advantage is always reward minus group mean")
    norm_adv_by_std: bool = key(True, "divide the advantage by the group's unbiased standard deviation + 1e-6")
    loss_mode: Literal["vanilla", "gspo"] = key("vanilla", "ratio and clip per token, or (gspo) per sequence")
    loss_agg: Literal["micro-batch-mean", "token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = key(
        "micro-batch-mean",
        "micro-batch-mean: token mean of each micro-batch, then their mean (the paper's code); "
        "token-mean: mean over all tokens of the mini-batch, on all ranks; seq-mean-token-mean: mean of the sequences' "
        "token means; seq-mean-token-sum-norm: mean of the sequences' token sums / loss_scale_factor (Dr. GRPO)",
    )
    loss_scale_factor: int | None = key(None, "divisor of the sums of loss_agg; null: data.max_response_length", ge=1)
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    kl_ctrl: KlCtrlConfig = KlCtrlConfig()


class GrpoDataConfig(Section):
    train_files: Texts = Field(min_length=1, description="parquet file, or list of them, with the training prompts")
    val_files: Texts = key((), "parquet file(s) of held-out conversations; none: no validation")
    train_batch_size: int = key(128, "prompts per step", ge=1)
    max_prompt_length: int = key(1536, "largest number of tokens of a prompt", ge=1)
    max_response_length: int = key(1024, "largest number of tokens of a response", ge=1)
    filter_overlong_prompts: bool = key(True, "leave out prompts above max_prompt_length; false: see data.truncation")
    truncation: Literal["error", "left", "right"] = key("error", "longer prompts: an error, or cut at that end")
    shuffle: bool = key(True, "new order of the prompts in each epoch, drawn from data.seed")
    samples_file: Text | None = key(
        None,
        "samples.jsonl of the warm-up: in each epoch its prompts of middling difficulty come first; null: no order",
    )
    skip_bad: int = key(0, "rows that may be left out because the index lacks a gold passage of theirs", ge=0)
    seed: int = key(1, "seed of the order of the prompts", ge=0)
    prompt_key: Text = key("prompt", "column that holds the chat messages")
    val_max_samples: CountOrMinusOne = key(-1, "prompts per validation; -1: all")


class PolicyModelConfig(Section):
    path: Text = Field(description="folder or hub name of the policy to start from; also the frozen reference")
    use_remove_padding: bool = key(True, "several prompts' trees in one row without padding; false: one row per tree")
    enable_gradient_checkpointing: bool = key(
        True, "recompute activations in the backward pass: less memory, about a third more time"
    )
    trust_remote_code: bool = key(False, "run Python code of the model folder")
    dtype: Dtype = key("bf16", "type of the policy's arithmetic; weights and Adam's state stay in fp32")
    lora_rank: int = key(0, "rank of LoRA adapters beside frozen weights (needs the extra lora); 0: none", ge=0)
    lora_alpha: float = key(16.0, "adapters are scaled by lora_alpha / lora_rank", gt=0)
    target_modules: Texts = key(("all-linear",), "layers that get an adapter; all-linear: all but the output layer")


class GrpoOptimConfig(Section):
    lr: float = key(1e-6, "peak learning rate", gt=0)
    lr_warmup_steps: int = key(100, "optimiser steps in which the learning rate rises from 0", ge=0)
    lr_scheduler: Literal["constant", "cosine"] = key("constant", "learning rate after the warm-up")
    min_lr_ratio: float = key(0.0, "final learning rate of the cosine, as a share of lr", ge=0, le=1)
    weight_decay: float = key(0.01, "AdamW's weight decay", ge=0)
    betas: Betas = key((0.9, 0.999), "AdamW's decay rates")


class ActorFsdpConfig(Section):
    param_offload: bool = key(False, "keep weights, gradients and Adam's state in CPU memory between passes")
    optimizer_offload: bool = key(False, "keep Adam's state in CPU memory between updates")


class RefFsdpConfig(Section):
    param_offload: bool = key(True, "keep the reference's weights in CPU memory between uses")


class ActorConfig(Section):
    optim: GrpoOptimConfig = GrpoOptimConfig()
    ppo_mini_batch_size: int = key(128, "prompts per optimiser step; on-policy if equal to train_batch_size", ge=1)
    ppo_micro_batch_size_per_gpu: int = key(8, "sequences per forward-backward pass of one rank", ge=1)
    ppo_max_token_len_per_gpu: int | None = key(
        None, "largest number of tokens per forward-backward pass (padding counts); null: no limit", ge=1
    )
    ppo_epochs: int = key(1, "passes over the rollouts of a step", ge=1)
    use_kl_loss: bool = key(True, "add the KL to the frozen reference to the loss")
    kl_loss_coef: float = key(0.001, "weight of that KL", ge=0)
    kl_loss_type: Literal["low_var_kl", "kl", "mse", "abs"] = key("low_var_kl", "estimator of that KL, per token")
    clip_ratio: float = key(0.2, "the policy ratio is clipped below 1 - clip_ratio", gt=0, lt=1)
    clip_ratio_high: float | None = key(None, "it is clipped above 1 + clip_ratio_high; null: clip_ratio", gt=0)
    llds_coef: float = key(
        0.0, "weight of the penalty on falling log-probs of samples whose advantage is not negative (LLDS)", ge=0
    )
    entropy_coeff: float = key(0.0, "weight of the entropy bonus; algorithm=grpo_faithful: 0.001", ge=0)
    grad_clip: float = key(1.0, "largest gradient norm", gt=0)
    share_prompts: bool = key(True, "compute each prompt once for its whole group; exact (not in verl)")
    skip_zero_advantage: bool = key(False, "leave groups with equal rewards out of the update (not in the paper)")
    fsdp_config: ActorFsdpConfig = ActorFsdpConfig()


class RolloutConfig(Section):
    name: Literal["vllm", "hf"] = key("vllm", "sampler: vllm, or hf (our own, on the transformers model)")
    n: int = key(8, "samples per prompt (the group)", ge=2)
    n_train: int | None = key(
        None, "of them the update learns from these many, whose rewards have the largest variance; null: all", ge=2
    )
    temperature: float = key(0.7, "sampling temperature", gt=0)
    top_p: float = key(1.0, "share of the probability that is sampled from", gt=0, le=1)
    seed: int = key(1, "seed of the samples; step and prompt are added to it", ge=0)
    max_num_seqs: int = key(256, "sequences that one sampler decodes at once", ge=1)
    n_gpus_per_node: int = key(0, "GPUs per node for samplers only; 0: they share those of the policy", ge=0)
    overlap: bool = key(
        False,
        "one step off-policy: draw the samples of the next step while the policy trains, with weights one step old; "
        "needs n_gpus_per_node > 0; use it with algorithm.rollout_correction",
    )
    tensor_model_parallel_size: int = key(1, "GPUs per sampler (vllm)", ge=1)
    gpu_memory_utilization: float = key(0.6, "share of a GPU's memory for the sampler (vllm)", gt=0, le=1)
    log_prob_micro_batch_size_per_gpu: int = key(32, f"{NO_EFFECT}passes are as large as those of the update", ge=1)
    stop: Texts = key((), "strings that end a response and stay in it; none: only the model's own end")
    dtype: Dtype = key("bf16", "type of the sampler's arithmetic")
    replay_from: Text | None = key(None, "run folder whose rollouts replace sampling and ranking; null: none")

    @property
    def trained(self) -> int:
        """Samples per prompt that the update learns from."""
        return self.n_train or self.n

    @model_validator(mode="after")
    def _subset(self) -> Self:
        if self.trained > self.n:
            raise ValueError(f"n_train={self.n_train} is above n={self.n}: lower it, or draw more samples")
        return self


class RefConfig(Section):
    log_prob_micro_batch_size_per_gpu: int = key(32, f"{NO_EFFECT}passes are as large as those of the update", ge=1)
    fsdp_config: RefFsdpConfig = RefFsdpConfig()


class ActorRolloutRefConfig(Section):
    model: PolicyModelConfig
    actor: ActorConfig = ActorConfig()
    rollout: RolloutConfig = RolloutConfig()
    ref: RefConfig = RefConfig()


class RewardConfig(Section):
    name: RewardName = key(
        "rank_incentive",
        "reward of a gold rank; rank_incentive: the paper's; similarity_gain: only the similarity (RQR)",
    )
    rank_weight: float = key(1.0, "weight of the rank's reward; not used under similarity_gain", ge=0)
    similarity_weight: float = key(
        0.0,
        "weight of 10 x mean over positives of [cos(output, positive) - cos(question, positive)]; "
        "above 0 with a rank's name: a mix; 0 under similarity_gain means 1",
        ge=0,
    )
    form: Literal["rewrite", "answer", "text"] = key(
        "rewrite",
        "output format; rewrite: <think>..</think> and <rewrite>..</rewrite>; answer: <answer> instead; text: any",
    )
    format_penalty: float = key(-0.1, "reward of a response that breaks the format, instead of the rank's", le=0)
    language_guard: bool = key(False, "treat a rewrite in another script than the question's as broken format")
    language_guard_share: float = key(
        0.2, "largest excess of a rewrite's share of non-Latin letters over the question's (language_guard)", ge=0, le=1
    )

    @property
    def weights(self) -> tuple[float, float]:
        """(weight of the rank's reward, weight of the similarity)."""
        if self.name == "similarity_gain":
            return 0.0, self.similarity_weight or 1.0
        return self.rank_weight, self.similarity_weight

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any(self.weights):
            raise ValueError("rank_weight=0.0 and similarity_weight=0.0 leave no reward: raise one of them")
        return self


class RewardModelConfig(Section):
    reward_manager: Literal["rewrite_r1"] = key("rewrite_r1", f"{NO_EFFECT}there is one way to reward a response")
    reward: RewardConfig = RewardConfig()


class CustomRewardFunctionConfig(Section):
    path: Text | None = key(
        None,
        f"{NO_EFFECT}null or verl/verl/utils/{SEED_REWARD_FILE}; the reward is reward_model.reward, no file is read",
    )
    name: Text | None = key(None, f"{NO_EFFECT}null or compute_score; the reward is reward_model.reward")

    @field_validator("path")
    @classmethod
    def _built_in_only(cls, value: str | None) -> str | None:
        if value is not None and not f"/{value}".endswith(f"/{SEED_REWARD_FILE}"):
            accepted = f"only {SEED_REWARD_FILE} is accepted, for the built-in reward"
            raise ValueError(f"'{value}' is not loaded: {accepted}; choose the reward by reward_model.reward.name")
        return value

    @field_validator("name")
    @classmethod
    def _seed_function_only(cls, value: str | None) -> str | None:
        if value not in (None, "compute_score"):
            raise ValueError(f"'{value}' is not called: leave it out; choose the reward by reward_model.reward.name")
        return value


class RetrieverConfig(Section):
    url: Text = key(
        "",
        "http://host:port of a server; '': $RETRIEVER_URL; embedded:INDEX_FOLDER: the trainer starts and stops its own",
    )
    index: Text | None = key(None, "which index of the server; null: its default")
    similarity_model: Text = key("BAAI/bge-base-en-v1.5", "encoder of the similarity for embedded:INDEX_FOLDER")
    topk: int = key(100, "depth: gold passages below this rank earn nothing", ge=1)
    timeout_s: float = key(60.0, "seconds for one request", gt=0)
    max_wait_s: float = key(600.0, "seconds of retries before a silent server ends the run", ge=0)

    def resolved_url(self) -> str:
        """``url``, or $RETRIEVER_URL if it is empty. Raises ValueError when there is neither."""
        url, choices = self.url or os.environ.get("RETRIEVER_URL", ""), "http://host:port or embedded:INDEX_FOLDER"
        if not url:
            raise ValueError(f"retriever.url is empty and RETRIEVER_URL is not set: give {choices}")
        if not url.startswith(("http://", "https://", EMBEDDED)):
            raise ValueError(f"retriever.url={url} is not a retriever: give {choices}")
        return url


class GrpoTrainerConfig(TrainerSection):
    project_name: Text = key("convsearch-grpo", "project in wandb")
    n_gpus_per_node: int = key(8, "ranks per node (processes, on CPU)", ge=1)
    nnodes: int = key(1, "number of nodes; more than one: of the Ray cluster that `ray start` has made", ge=1)
    max_restarts: int = key(3, "how often lost workers are restarted from the newest checkpoint", ge=0)
    worker_timeout_s: float = key(1800.0, "a worker process that is silent for this many seconds counts as lost", gt=0)
    save_freq: CountOrMinusOne = key(100, "steps between checkpoints; -1: only at the end")
    test_freq: CountOrMinusOne = key(-1, "steps between validations; -1: never")
    val_before_train: bool = key(False, "validation before the first step")
    default_local_dir: Text = key("outputs/run/grpo", "folder for checkpoints, logs, rollouts and the exported model")
    total_epochs: int = key(6, "passes over the training prompts", ge=1)
    total_training_steps: int | None = key(None, "number of steps; null: total_epochs decides", ge=1)
    critic_warmup: Literal[0] = key(0, f"{NO_EFFECT}must be 0; GRPO has no critic")
    sample_table_freq: CountOrMinusOne = key(50, "steps between tables of samples in wandb and TensorBoard; -1: never")
    seed: int = key(1, "seed of everything random; the default of data.seed and rollout.seed", ge=0)

    @property
    def world_size(self) -> int:
        """Ranks of the policy."""
        return self.nnodes * self.n_gpus_per_node


class GrpoConfig(Section):
    """The whole configuration of ``convsearch.grpo``."""

    algorithm: AlgorithmConfig = AlgorithmConfig()
    data: GrpoDataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    reward_model: RewardModelConfig = RewardModelConfig()
    custom_reward_function: CustomRewardFunctionConfig = CustomRewardFunctionConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    trainer: GrpoTrainerConfig = GrpoTrainerConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _batches(self) -> Self:
        actor, rollout, world_size = (
            self.actor_rollout_ref.actor,
            self.actor_rollout_ref.rollout,
            self.trainer.world_size,
        )
        mini, prefix = actor.ppo_mini_batch_size, "actor_rollout_ref.actor."
        require_multiple("data.train_batch_size", self.data.train_batch_size, f"{prefix}ppo_mini_batch_size", mini)
        name = f"sequences per update (ppo_mini_batch_size * rollout.{'n_train' if rollout.n_train else 'n'})"
        require_multiple(name, mini * rollout.trained, "the ranks (trainer.nnodes * n_gpus_per_node)", world_size)
        if self.algorithm.loss_agg == "micro-batch-mean":
            name, micro = "sequences per update on one rank", actor.ppo_micro_batch_size_per_gpu
            require_multiple(name, mini * rollout.trained // world_size, f"{prefix}ppo_micro_batch_size_per_gpu", micro)
        name, gpus = "trainer.n_gpus_per_node", self.trainer.n_gpus_per_node
        if rollout.n_gpus_per_node:
            name, gpus = "actor_rollout_ref.rollout.n_gpus_per_node", rollout.n_gpus_per_node
        require_multiple(name, gpus, "rollout.tensor_model_parallel_size", rollout.tensor_model_parallel_size)
        if rollout.overlap and not rollout.n_gpus_per_node:
            raise ValueError(
                "actor_rollout_ref.rollout.overlap=true with rollout.n_gpus_per_node=0: samplers that share the "
                "policy's GPUs sleep while it trains; give them GPUs (cluster=disaggregated), or set overlap=false"
            )
        return self

    @model_validator(mode="after")
    def _losses(self) -> Self:
        actor, tokens, prefix = self.actor_rollout_ref.actor, self.max_tokens, "actor_rollout_ref.actor."
        budget, high = actor.ppo_max_token_len_per_gpu, actor.clip_ratio_high
        if budget is not None and budget < tokens:
            lengths = f"data.max_prompt_length + data.max_response_length={tokens}"
            raise ValueError(
                f"{prefix}ppo_max_token_len_per_gpu={budget} is below {lengths}: raise it to fit a long sequence"
            )
        if high is not None and high < actor.clip_ratio:
            low = f"clip_ratio={actor.clip_ratio}"
            raise ValueError(f"{prefix}clip_ratio_high={high} is below {low}: raise it, or set it to null")
        if actor.llds_coef and not self.several_updates:
            batch = f"train_batch_size=ppo_mini_batch_size={actor.ppo_mini_batch_size}, ppo_epochs=1"
            raise ValueError(
                f"{prefix}llds_coef={actor.llds_coef} is without effect where a step makes one update ({batch}): no "
                "log-prob has fallen yet; set ppo_epochs=2, a smaller ppo_mini_batch_size, or llds_coef=0"
            )
        form, world_size = self.trainer.checkpoint_format, self.trainer.world_size
        rank = self.actor_rollout_ref.model.lora_rank
        if rank and (form == "dcp" or (form == "auto" and world_size > 1)):
            raise ValueError(
                f"actor_rollout_ref.model.lora_rank={rank} with trainer.checkpoint_format={form} on {world_size} "
                "ranks: dcp does not merge adapters; set trainer.checkpoint_format=safetensors"
            )
        coef = self.algorithm.kl_ctrl.kl_coef
        if coef and not actor.use_kl_loss:
            raise ValueError(
                f"algorithm.kl_ctrl.kl_coef={coef} with {prefix}use_kl_loss=false needs a KL in the reward, "
                "which is not supported: set kl_coef=0 or use_kl_loss=true"
            )
        return self

    @model_validator(mode="after")
    def _validation(self) -> Self:
        metric, known = self.trainer.best_metric, ("val_mrr", "val_reward", "val_format_rate")
        if metric is not None and metric not in known:
            raise ValueError(f"trainer.best_metric={metric} is not one of {', '.join(known)}: choose one of them")
        if metric is not None and (self.trainer.test_freq < 0 or not self.data.val_files):
            keys = f"trainer.test_freq={self.trainer.test_freq}, data.val_files={list(self.data.val_files)}"
            raise ValueError(f"trainer.best_metric={metric} needs a validation ({keys}): set both, or set it to null")
        return self

    @property
    def several_updates(self) -> bool:
        """Whether a step makes several updates, so that the ratio needs the log-probs of before the first one."""
        actor = self.actor_rollout_ref.actor
        return self.data.train_batch_size > actor.ppo_mini_batch_size or actor.ppo_epochs > 1

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence: prompt and response."""
        return self.data.max_prompt_length + self.data.max_response_length

    @property
    def max_tokens_per_pass(self) -> int:
        """Positions per forward pass: the limit, or ``ppo_micro_batch_size_per_gpu`` sequences of full length."""
        actor = self.actor_rollout_ref.actor
        return actor.ppo_max_token_len_per_gpu or actor.ppo_micro_batch_size_per_gpu * self.max_tokens

    def check_context(self, model_max: int) -> None:
        """Raises ValueError when prompt and response are longer than the model's ``model_max`` positions."""
        require_fit("data.max_prompt_length + data.max_response_length", self.max_tokens, model_max)
