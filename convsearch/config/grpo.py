"""The configuration of the RL stage (``python -m convsearch.grpo``): the key tree of the seed's ``main_ppo`` command lines.

Defaults are the paper's preset for 8 GPUs without the entropy bonus: the paper does not mention it, but it was the default of its trainer, so
``algorithm=grpo_faithful`` (which the paper's experiments choose) turns it on.
"""

import os
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from convsearch.config.base import (
    Betas,
    CountOrMinusOne,
    Dtype,
    Section,
    Text,
    Texts,
    TrainerSection,
    require_fit,
    require_multiple,
)
from convsearch.config.guard import GuardConfig

EMBEDDED = "embedded:"
SEED_REWARD_FILE = "reward_score/rewrite_r1.py"


class KlCtrlConfig(Section):
    kl_coef: float = Field(
        default=0.0,
        ge=0,
        description="KL penalty inside the reward; without effect while the KL is in the loss (use_kl_loss), as in verl",
    )


class FilterGroupsConfig(Section):
    enable: bool = Field(
        default=False, description="DAPO's dynamic sampling: groups whose rewards are all equal are drawn again"
    )
    max_num_gen_batches: int = Field(
        default=10,
        ge=1,
        description="draws of a step at most; groups that stay equal are left out of the update and of its mean",
    )


class RolloutCorrectionConfig(Section):
    rollout_is: Literal["token", "sequence"] | None = Field(
        default=None, description="importance weight of policy against sampler, by token or by sequence; null: none"
    )
    rollout_is_threshold: float = Field(default=2.0, gt=0, description="the largest such weight: above it is truncated")


class AlgorithmConfig(Section):
    name: Literal["grpo"] = Field(default="grpo", description="the step function")
    adv_estimator: Literal["grpo"] = Field(default="grpo", description="advantage: reward against the group's mean")
    norm_adv_by_std: bool = Field(
        default=True, description="divide the advantage by the group's unbiased standard deviation + 1e-6"
    )
    loss_mode: Literal["vanilla", "gspo"] = Field(
        default="vanilla", description="vanilla: a ratio and clip a token; gspo: one a sequence, length-normalised"
    )
    loss_agg: Literal["micro-batch-mean", "token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = Field(
        default="micro-batch-mean",
        description="micro-batch-mean: token mean of each micro-batch, then their mean (the paper's code); "
        "token-mean: mean over all tokens of the mini-batch, on all ranks; seq-mean-token-mean: mean of the sequences' token means; "
        "seq-mean-token-sum-norm: mean of the sequences' token sums over loss_scale_factor (Dr. GRPO)",
    )
    loss_scale_factor: int | None = Field(
        default=None, ge=1, description="tokens that seq-mean-token-sum-norm divides by; null: data.max_response_length"
    )
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    kl_ctrl: KlCtrlConfig = KlCtrlConfig()


class GrpoDataConfig(Section):
    train_files: Texts = Field(min_length=1, description="parquet file, or list of them, with the training prompts")
    val_files: Texts = Field(default=(), description="parquet file(s) of held-out conversations; none: no validation")
    train_batch_size: int = Field(default=128, ge=1, description="prompts a step")
    max_prompt_length: int = Field(default=1536, ge=1, description="tokens of a prompt")
    max_response_length: int = Field(default=1024, ge=1, description="tokens of a response")
    filter_overlong_prompts: bool = Field(
        default=True, description="leave out prompts above max_prompt_length; false: data.truncation decides"
    )
    truncation: Literal["error", "left", "right"] = Field(
        default="error", description="what happens to a longer prompt: an error, or cut at that end"
    )
    shuffle: bool = Field(default=True, description="new order of the prompts in each epoch, drawn from data.seed")
    seed: int = Field(default=1, ge=0, description="seed of the order of the prompts")
    prompt_key: Text = Field(default="prompt", description="column that holds the chat messages")
    val_max_samples: CountOrMinusOne = Field(default=-1, description="prompts of a validation; -1: all")


class PolicyModelConfig(Section):
    path: Text = Field(description="folder or hub name of the policy to start from; also the frozen reference")
    use_remove_padding: bool = Field(
        default=True, description="several prompts' trees in one row and no padding; false: a row each"
    )
    enable_gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    dtype: Dtype = Field(
        default="bf16", description="type of the policy's arithmetic; weights and Adam's state are kept in fp32"
    )
    lora_rank: int = Field(
        default=0,
        ge=0,
        description="rank of LoRA adapters, trained beside frozen weights (needs the extra lora); 0: none",
    )
    lora_alpha: float = Field(default=16.0, gt=0, description="adapters are scaled by lora_alpha / lora_rank")
    target_modules: Texts = Field(
        default=("all-linear",), description="layers that get an adapter, by name; all-linear: all but the output's"
    )


class GrpoOptimConfig(Section):
    lr: float = Field(default=1e-6, gt=0, description="peak learning rate")
    lr_warmup_steps: int = Field(
        default=100, ge=0, description="optimiser steps in which the learning rate rises from 0"
    )
    lr_scheduler: Literal["constant", "cosine"] = Field(
        default="constant", description="learning rate after the warm-up"
    )
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="where the cosine ends, as a share of lr")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay")
    betas: Betas = Field(default=(0.9, 0.999), description="AdamW's decay rates")


class ActorFsdpConfig(Section):
    param_offload: bool = Field(
        default=False,
        description="keep weights, gradients and Adam's state in CPU memory; layers come to the GPU for each pass",
    )
    optimizer_offload: bool = Field(default=False, description="keep Adam's state in CPU memory between updates")


class RefFsdpConfig(Section):
    param_offload: bool = Field(default=True, description="keep the reference's weights in CPU memory between uses")


class ActorConfig(Section):
    optim: GrpoOptimConfig = GrpoOptimConfig()
    ppo_mini_batch_size: int = Field(
        default=128,
        ge=1,
        description="prompts an optimiser step; equal to train_batch_size: one on-policy update a step",
    )
    ppo_micro_batch_size_per_gpu: int = Field(
        default=8, ge=1, description="sequences a forward-backward pass on one rank"
    )
    ppo_max_token_len_per_gpu: int | None = Field(
        default=None, ge=1, description="tokens a forward-backward pass at most (padding counted); null: no such limit"
    )
    ppo_epochs: int = Field(default=1, ge=1, description="passes over a step's rollouts")
    use_kl_loss: bool = Field(default=True, description="add the KL to the frozen reference to the loss")
    kl_loss_coef: float = Field(default=0.001, ge=0, description="weight of that KL")
    kl_loss_type: Literal["low_var_kl", "kl", "mse", "abs"] = Field(
        default="low_var_kl", description="estimator of that KL, a token at a time"
    )
    clip_ratio: float = Field(
        default=0.2, gt=0, lt=1, description="the policy ratio is clipped below 1 - this, and above 1 + clip_ratio_high"
    )
    clip_ratio_high: float | None = Field(default=None, gt=0, description="upper clip; null: clip_ratio")
    entropy_coeff: float = Field(
        default=0.0,
        ge=0,
        description="weight of the entropy bonus; 0.001 in algorithm=grpo_faithful, as in the reference's trainer",
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    share_prompts: bool = Field(
        default=True, description="compute each prompt once for its whole group; exact (not in verl)"
    )
    skip_zero_advantage: bool = Field(
        default=False,
        description="leave groups whose rewards are all equal out of the update: they only carry KL and entropy (not in the paper)",
    )
    fsdp_config: ActorFsdpConfig = ActorFsdpConfig()


class RolloutConfig(Section):
    name: Literal["vllm", "hf"] = Field(default="vllm", description="sampler: vllm, or hf for transformers' own")
    n: int = Field(default=8, ge=2, description="samples a prompt: the group")
    temperature: float = Field(default=0.7, gt=0, description="sampling temperature")
    top_p: float = Field(default=1.0, gt=0, le=1, description="share of the probability that is sampled from")
    seed: int = Field(default=1, ge=0, description="seed of the samples; step and prompt are added to it")
    max_num_seqs: int = Field(default=256, ge=1, description="sequences decoded at once by one sampler")
    n_gpus_per_node: int = Field(
        default=0,
        ge=0,
        description="GPUs a node (processes, on CPU) for samplers alone; 0: they share those of the policy's ranks",
    )
    overlap: bool = Field(
        default=False,
        description="one step off-policy: the next step's samples are drawn while the policy trains, by weights one step old; needs n_gpus_per_node "
        "of its own, and wants algorithm.rollout_correction",
    )
    tensor_model_parallel_size: int = Field(default=1, ge=1, description="GPUs that share one sampler (vllm)")
    gpu_memory_utilization: float = Field(
        default=0.6, gt=0, le=1, description="share of a GPU's memory for the sampler (vllm)"
    )
    log_prob_micro_batch_size_per_gpu: int = Field(
        default=32, ge=1, description="sequences a forward pass when the policy's log-probs are recomputed"
    )
    stop: Texts = Field(
        default=(), description="strings that end a response and stay in it; none: only the model's own end"
    )
    dtype: Dtype = Field(default="bf16", description="type of the sampler's arithmetic")
    replay_from: Text | None = Field(
        default=None, description="run folder whose dumped rollouts take the place of sampling and ranking; null: none"
    )


class RefConfig(Section):
    log_prob_micro_batch_size_per_gpu: int = Field(
        default=32, ge=1, description="sequences a forward pass of the reference"
    )
    fsdp_config: RefFsdpConfig = RefFsdpConfig()


class ActorRolloutRefConfig(Section):
    model: PolicyModelConfig
    actor: ActorConfig = ActorConfig()
    rollout: RolloutConfig = RolloutConfig()
    ref: RefConfig = RefConfig()


class RewardConfig(Section):
    name: Literal["rank_incentive", "reciprocal", "exponential", "curriculum", "mrr", "ndcg@3", "similarity_gain"] = (
        Field(
            default="rank_incentive",
            description="what a gold rank is worth; rank_incentive is the paper's; similarity_gain: nothing, the similarity alone is paid (RQR)",
        )
    )
    rank_weight: float = Field(
        default=1.0, ge=0, description="weight of the rank's worth; without effect under similarity_gain"
    )
    similarity_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of 10 x mean over positives of [cos(output, positive) - cos(question, positive)]; "
        "above 0 beside a rank's name: a mix; 0 under similarity_gain means 1",
    )
    form: Literal["rewrite", "answer", "text"] = Field(
        default="rewrite",
        description="what an output must look like: <think>..</think> and <rewrite>..</rewrite>; <answer> in its place; or any text",
    )
    format_penalty: float = Field(
        default=-0.1, le=0, description="reward of a response that breaks the format, instead of the rank's"
    )
    language_guard: bool = Field(
        default=False, description="treat a rewrite in another script than the question's as broken format"
    )
    language_guard_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="share of non-Latin letters that a rewrite may have beyond its question's before the guard acts",
    )

    @property
    def weights(self) -> tuple[float, float]:
        """Of the rank's worth and of the similarity."""
        return (
            (0.0, self.similarity_weight or 1.0)
            if self.name == "similarity_gain"
            else (self.rank_weight, self.similarity_weight)
        )

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any(self.weights):
            raise ValueError("rank_weight=0.0 and similarity_weight=0.0 leave nothing to pay for: raise one of them")
        return self


class RewardModelConfig(Section):
    reward_manager: Literal["rewrite_r1"] = Field(
        default="rewrite_r1", description="parse the response, ask the retriever for the gold rank, pay by rank"
    )
    reward: RewardConfig = RewardConfig()


class CustomRewardFunctionConfig(Section):
    path: Text | None = Field(
        default=None,
        description=f"null, or the seed's verl/verl/utils/{SEED_REWARD_FILE}: both mean the built-in reward "
        "(reward_model.reward); no file is read",
    )
    name: Text | None = Field(
        default=None, description="null or compute_score, the seed's function: the built-in reward"
    )

    @field_validator("path")
    @classmethod
    def _built_in_only(cls, value: str | None) -> str | None:
        if value is not None and not f"/{value}".endswith(f"/{SEED_REWARD_FILE}"):
            raise ValueError(
                f"'{value}' is not loaded: only the seed's {SEED_REWARD_FILE} is accepted, for the built-in reward; "
                "choose the reward by reward_model.reward.name"
            )
        return value

    @field_validator("name")
    @classmethod
    def _seed_function_only(cls, value: str | None) -> str | None:
        if value not in (None, "compute_score"):
            raise ValueError(f"'{value}' is not called: leave it out; the reward is chosen by reward_model.reward.name")
        return value


class RetrieverConfig(Section):
    url: Text = Field(
        default="",
        description="http://host:port of the server; '': $RETRIEVER_URL; embedded:INDEX_FOLDER: the trainer starts and stops its own",
    )
    index: Text | None = Field(default=None, description="which of the server's indexes; null: its default")
    similarity_model: Text = Field(
        default="BAAI/bge-base-en-v1.5",
        description="encoder of the similarity for embedded: (a folder or hub name); a server elsewhere was started with its own",
    )
    topk: int = Field(default=100, ge=1, description="depth: gold passages below this rank earn nothing")
    timeout_s: float = Field(default=60.0, gt=0, description="seconds for one request")
    max_wait_s: float = Field(default=600.0, ge=0, description="seconds of retries before a silent server ends the run")

    def resolved_url(self) -> str:
        """``url``, or $RETRIEVER_URL where it is empty. Raises ValueError when there is neither."""
        url = self.url or os.environ.get("RETRIEVER_URL", "")
        if not url:
            raise ValueError(
                "retriever.url is empty and RETRIEVER_URL is not set: give http://host:port, or embedded:INDEX_FOLDER"
            )
        if not url.startswith(("http://", "https://", EMBEDDED)):
            raise ValueError(f"retriever.url={url} is neither http://host:port nor embedded:INDEX_FOLDER")
        return url

    def embedded_index(self) -> str | None:
        """The index folder of ``embedded:<index>``, or None for a server that runs elsewhere. Raises ValueError like resolved_url."""
        url = self.resolved_url()
        return url.removeprefix(EMBEDDED) if url.startswith(EMBEDDED) else None


class GrpoTrainerConfig(TrainerSection):
    project_name: Text = Field(default="convsearch-grpo", description="project in wandb")
    n_gpus_per_node: int = Field(default=8, ge=1, description="ranks a node (processes, on CPU)")
    nnodes: int = Field(
        default=1, ge=1, description="number of nodes; more than one: of the Ray cluster that `ray start` has made"
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="how often lost worker processes are started again from the newest checkpoint before the run ends",
    )
    worker_timeout_s: float = Field(
        default=1800.0, gt=0, description="seconds without an answer after which a worker process counts as lost"
    )
    save_freq: CountOrMinusOne = Field(default=100, description="checkpoint every so many steps; -1: at the end alone")
    test_freq: CountOrMinusOne = Field(default=-1, description="validation every so many steps; -1: never")
    val_before_train: bool = Field(default=False, description="validation before the first step")
    default_local_dir: Text = Field(
        default="outputs/run/grpo", description="folder for checkpoints, logs, rollouts and the exported model"
    )
    total_epochs: int = Field(default=6, ge=1, description="passes over the training prompts")
    total_training_steps: int | None = Field(
        default=None, ge=1, description="stop after so many steps; null: total_epochs decides"
    )
    critic_warmup: Literal[0] = Field(default=0, description="0 only: GRPO has no critic")
    sample_table_freq: CountOrMinusOne = Field(
        default=50, description="a table of samples to wandb and TensorBoard every so many steps; -1: never"
    )
    seed: int = Field(
        default=1, ge=0, description="seed of everything random; data.seed and rollout.seed follow it unless set"
    )

    @property
    def world_size(self) -> int:
        """Ranks of the policy."""
        return self.nnodes * self.n_gpus_per_node


class GrpoConfig(Section):
    """Everything that ``convsearch.grpo`` is told."""

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
        actor, n, world = self.actor_rollout_ref.actor, self.actor_rollout_ref.rollout.n, self.trainer.world_size
        mini = actor.ppo_mini_batch_size
        require_multiple(
            "data.train_batch_size", self.data.train_batch_size, "actor_rollout_ref.actor.ppo_mini_batch_size", mini
        )
        require_multiple(
            "sequences an update (ppo_mini_batch_size * rollout.n)",
            mini * n,
            "the ranks (trainer.nnodes * n_gpus_per_node)",
            world,
        )
        if self.algorithm.loss_agg == "micro-batch-mean":
            micro = actor.ppo_micro_batch_size_per_gpu
            require_multiple(
                "sequences an update on one rank",
                mini * n // world,
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
                micro,
            )
        rollout = self.actor_rollout_ref.rollout
        name, gpus = "trainer.n_gpus_per_node", self.trainer.n_gpus_per_node
        if rollout.n_gpus_per_node:
            name, gpus = "actor_rollout_ref.rollout.n_gpus_per_node", rollout.n_gpus_per_node
        require_multiple(name, gpus, "rollout.tensor_model_parallel_size", rollout.tensor_model_parallel_size)
        if rollout.overlap and not rollout.n_gpus_per_node:
            raise ValueError(
                "actor_rollout_ref.rollout.overlap=true with rollout.n_gpus_per_node=0: samplers that share the policy's GPUs sleep while it trains; "
                "give them some of their own (cluster=disaggregated), or set overlap=false"
            )
        return self

    @model_validator(mode="after")
    def _losses(self) -> Self:
        actor, tokens = self.actor_rollout_ref.actor, self.max_tokens
        budget = actor.ppo_max_token_len_per_gpu
        if budget is not None and budget < tokens:
            raise ValueError(
                f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={budget} is below data.max_prompt_length + data.max_response_length="
                f"{tokens}: raise it, or a long sequence will not fit"
            )
        if actor.clip_ratio_high is not None and actor.clip_ratio_high < actor.clip_ratio:
            raise ValueError(
                f"actor_rollout_ref.actor.clip_ratio_high={actor.clip_ratio_high} is below clip_ratio={actor.clip_ratio}: "
                "raise it, or set null"
            )
        form, world = self.trainer.checkpoint_format, self.trainer.world_size
        if self.actor_rollout_ref.model.lora_rank and (form == "dcp" or (form == "auto" and world > 1)):
            raise ValueError(
                f"actor_rollout_ref.model.lora_rank={self.actor_rollout_ref.model.lora_rank} with trainer.checkpoint_format={form} on {world} ranks: "
                "adapters are saved merged, in the other form; set trainer.checkpoint_format=safetensors"
            )
        coef = self.algorithm.kl_ctrl.kl_coef
        if coef and not actor.use_kl_loss:
            raise ValueError(
                f"algorithm.kl_ctrl.kl_coef={coef} with actor_rollout_ref.actor.use_kl_loss=false asks for a KL inside the reward, "
                "which is not offered: set kl_coef=0 or use_kl_loss=true"
            )
        return self

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence: prompt and response."""
        return self.data.max_prompt_length + self.data.max_response_length

    @property
    def max_tokens_per_pass(self) -> int:
        """Positions per forward pass: the configured limit, or ``ppo_micro_batch_size_per_gpu`` sequences of full length."""
        actor = self.actor_rollout_ref.actor
        return actor.ppo_max_token_len_per_gpu or actor.ppo_micro_batch_size_per_gpu * self.max_tokens

    def check_context(self, model_max: int) -> None:
        """Raises ValueError when prompt and response are longer than the model's ``model_max`` positions."""
        require_fit("data.max_prompt_length + data.max_response_length", self.max_tokens, model_max)
