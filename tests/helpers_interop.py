"""Runs TRL's trainer or verl's reward managers with our rewards, in a process of its own: ``python helpers_interop.py
trl|verl JSON``.

The libraries live in a folder that only its path names; its answer is JSON on the last line.
"""

import json
import sys
from typing import Any


def ask_trl(given: dict[str, Any]) -> dict[str, Any]:
    """One step of GRPOTrainer on the rows of our own parquet file."""
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    from convsearch.interop import RetrievalReward

    reward = RetrievalReward(given["url"])
    seen: list[dict[str, Any]] = []

    def watched(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        rewards = reward(prompts, completions, **columns)
        texts = [completion[-1]["content"] for completion in completions]
        truths = [list(row["ground_truth"]) for row in columns["reward_model"]]
        seen.extend({"text": t, "golds": g, "reward": r} for t, g, r in zip(texts, truths, rewards, strict=True))
        return rewards

    config = GRPOConfig(
        output_dir=given["folder"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=40,
        learning_rate=1e-2,
        max_steps=1,
        beta=0.0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        model_init_kwargs={"dtype": "float32"},
    )
    rows = load_dataset("parquet", data_files=given["parquet"], split="train", cache_dir=given["folder"])
    trainer = GRPOTrainer(given["model"], reward_funcs=[reward, watched], args=config, train_dataset=rows)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = max(
        float((parameter.detach() - before[name]).abs().max()) for name, parameter in trainer.model.named_parameters()
    )
    logged = next(log for log in trainer.state.log_history if "reward" in log)
    return {"seen": seen, "moved": moved, "logged": logged}


def ask_verl(given: dict[str, Any]) -> dict[str, Any]:
    """verl's own loader of custom functions, and its batch reward manager over a batch of two."""
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.workers.reward_manager.batch import BatchRewardManager
    from verl.workers.reward_manager.naive import NaiveRewardManager

    def load(name: str) -> Any:
        function = {"path": given["path"], "name": name, "reward_kwargs": given["kwargs"]}
        return get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": function}}))

    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in given["texts"]]
    longest = max(map(len, encoded))
    responses = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in encoded])
    mask = torch.tensor([[1] + [1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded])
    batch = DataProto.from_dict(
        tensors={
            "prompts": torch.ones(len(encoded), 1, dtype=torch.long),
            "responses": responses,
            "attention_mask": mask,
        },
        non_tensors={
            "data_source": np.array(["toy"] * len(encoded), dtype=object),
            "reward_model": np.array([{"ground_truth": golds} for golds in given["golds"]], dtype=object),
            "extra_info": np.array([{"question": "its food?"} for _ in encoded], dtype=object),
        },
    )
    answers: dict[str, Any] = {}
    for manager, name in ((NaiveRewardManager, "compute_score"), (BatchRewardManager, "compute_scores")):
        result = manager(tokenizer, 0, load(name))(batch, return_dict=True)
        answers[name] = {
            "rewards": result["reward_tensor"].sum(dim=1).tolist(),
            "on_last": [
                bool(row[len(ids) - 1] != 0) for row, ids in zip(result["reward_tensor"], encoded, strict=True)
            ],
            "extra": {key: list(map(float, value)) for key, value in result["reward_extra_info"].items()},
        }
    return answers


if __name__ == "__main__":
    print(json.dumps({"trl": ask_trl, "verl": ask_verl}[sys.argv[1]](json.loads(sys.argv[2]))))
