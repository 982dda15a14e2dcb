"""What GRPO promises.

1. At the first step the policy is the reference and the sampler: KL 0, ratio 1, no clipping, equal log-probs;
   advantages of a group sum to 0.
2. Losses and weights are those of the formulas written out with plain transformers, for both normalisations and several
   updates a step.
3. Ranks are the server's, rewards are the ranks'; every step is on disk and can be played back to the same losses.
4. A run that is broken off and started again draws the same samples and has the same losses.
5. Reward rises where there is something to learn.
6. A user's mistake ends in one sentence.
"""

import inspect
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest
import torch

from convsearch import grpo
from convsearch.algorithms.advantages import group_advantages
from convsearch.algorithms.max_variance import max_variance_subset
from convsearch.config import load_grpo_config
from convsearch.rewards.scoring import Rollout
from convsearch.rewards.shapes import rank_incentive
from convsearch.runs import rollouts
from convsearch.runs.tracking import read_metrics
from convsearch.trainers import grpo_step
from convsearch.trainers.data import stream_of
from convsearch.trainers.grpo import train

SAME = ("step", "loss", "policy_loss", "kl", "entropy", "reward", "grad_norm", "mrr", "response_tokens", "lr")


def trained(model: Path, parquet: Path, run_dir: Path, url: str, **changed: Any) -> list[dict[str, Any]]:
    train(load_grpo_config(helpers.grpo_overrides(model, parquet, run_dir, url, **changed)))
    return read_metrics(run_dir)


def curves(metrics: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [{name: record[name] for name in SAME} for record in metrics]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def groups(rollouts_N: Sequence[Rollout], n: int) -> list[Sequence[Rollout]]:
    return [rollouts_N[start : start + n] for start in range(0, len(rollouts_N), n)]


def test_the_first_step(form_llama: Path, toy_parquet: Path, toy_server: str, toy_index: Path, tmp_path: Path) -> None:
    from retriever_server.bm25.index import Bm25Index

    first, second, _ = trained(form_llama, toy_parquet, tmp_path, toy_server, rollout__temperature=0.7)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["clip_rate"] == 0
    assert first["sampler_gap"] < 1e-4
    assert second["sampler_gap"] < 1e-4  # the sampler has the new weights
    assert second["kl"] > 1e-7
    assert 0 < first["entropy"] < 6

    samples = rollouts.load(tmp_path, 0)
    assert len(samples) == 16
    assert all(len({rollout.example.qid for rollout in group}) == 1 for group in groups(samples, 4))
    assert len({rollout.example.qid for rollout in samples}) == 4
    for group in groups(samples, 4):
        assert sum(rollout.advantage for rollout in group) == pytest.approx(0, abs=1e-9)
    golds = {f"q{number}": [docid] for number, docid in enumerate(helpers.GOLDS.values())}
    parsed = [rollout for rollout in samples if rollout.score.rewrite.text is not None]
    ranks = Bm25Index.load(toy_index).gold_ranks(
        [r.score.rewrite.text for r in parsed], [golds[r.example.qid] for r in parsed], 100
    )  # type: ignore[misc]
    assert [rollout.score.feedback.rank for rollout in parsed] == ranks
    assert len(set(ranks)) > 2
    for rollout in samples:
        assert rollout.score.reward == (
            -0.1 if rollout.score.rewrite.text is None else rank_incentive(rollout.score.feedback.rank)
        )
    assert first["reward"] == pytest.approx(sum(rollout.score.reward for rollout in samples) / 16)
    assert first["format_rate"] == len(parsed) / 16
    assert {rollout.completion.weights_version for rollout in rollouts.load(tmp_path, 2)} == {2}


def test_the_step_reads_on_one_screen() -> None:
    assert len(inspect.getsource(grpo_step.grpo_step).splitlines()) <= 45


class Plain:
    """GRPO as its formulas say, sequence by sequence, on a model as transformers gives it."""

    def __init__(self, folder: Path, lr: float, temperature: float, llds: float = 0.0):
        from transformers import AutoModelForCausalLM

        self.model, self.reference = (
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager") for _ in range(2)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
        self.temperature, self.llds = temperature, llds

    def logprobs(self, model: Any, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        prompt, tokens = rollout.example.prompt_ids, rollout.completion.token_ids
        logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        logprobs_TV = (logits_TV.float() / self.temperature).log_softmax(-1)
        return logprobs_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0], -(logprobs_TV.exp() * logprobs_TV).sum(-1)

    def loss(
        self, minibatch: Sequence[Rollout], old: Sequence[torch.Tensor], aggregation: str, micro: int
    ) -> torch.Tensor:
        losses = []
        for rollout, old_T in zip(minibatch, old, strict=True):
            logprobs_T, entropy_T = self.logprobs(self.model, rollout)
            with torch.no_grad():
                reference_T, _ = self.logprobs(self.reference, rollout)
            ratio_T = (logprobs_T - old_T).exp()
            advantage = rollout.advantage
            policy_T = -torch.min(ratio_T * advantage, ratio_T.clamp(0.8, 1.2) * advantage)
            kl_T = ((reference_T - logprobs_T).exp() - (reference_T - logprobs_T) - 1).clamp(max=10)
            losses.append(policy_T + 0.05 * kl_T - 0.01 * entropy_T)
            if advantage >= 0 and logprobs_T.sum() < old_T.sum():
                losses[-1] = losses[-1] + self.llds * (old_T - logprobs_T).clamp(min=0)
        if aggregation == "token-mean":
            return torch.cat(losses).mean()
        means = [torch.cat(losses[start : start + micro]).mean() for start in range(0, len(losses), micro)]
        return torch.stack(means).mean()

    def step(self, samples: Sequence[Rollout], updates: int, aggregation: str, micro: int, epochs: int = 1) -> float:
        size, total = len(samples) // updates, 0.0
        with torch.no_grad():
            old = [self.logprobs(self.model, rollout)[0] for rollout in samples]
        for start in list(range(0, len(samples), size)) * epochs:
            loss = self.loss(samples[start : start + size], old[start : start + size], aggregation, micro)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            total += float(loss.detach())
        return total / updates / epochs


@pytest.mark.parametrize(
    ("aggregation", "updates", "options"),
    [
        ("micro-batch-mean", 1, {}),
        ("token-mean", 1, {"actor_rollout_ref__actor__ppo_max_token_len_per_gpu": 110}),
        ("micro-batch-mean", 2, {"actor_rollout_ref__actor__share_prompts": False}),
        ("token-mean", 4, {}),
        (
            "token-mean",
            2,
            {
                "actor_rollout_ref__rollout__n_train": 2,
                "actor_rollout_ref__actor__ppo_epochs": 2,
                "actor_rollout_ref__actor__llds_coef": 0.5,
            },
        ),
    ],
)
def test_losses_and_weights_are_those_of_the_formulas(
    aggregation: str,
    updates: int,
    options: dict[str, Any],
    form_llama: Path,
    toy_parquet: Path,
    toy_server: str,
    tmp_path: Path,
) -> None:
    metrics = trained(
        form_llama,
        toy_parquet,
        tmp_path,
        toy_server,
        total_training_steps=2,
        rollout__temperature=0.7,
        ppo_mini_batch_size=4 // updates,
        ppo_micro_batch_size_per_gpu=2,
        optim__lr=2e-3,
        algorithm__loss_agg=aggregation,
        actor_rollout_ref__actor__kl_loss_coef=0.05,
        actor_rollout_ref__actor__entropy_coeff=0.01,
        **options,
    )
    plain = Plain(form_llama, 2e-3, 0.7, options.get("actor_rollout_ref__actor__llds_coef", 0.0))
    epochs = options.get("actor_rollout_ref__actor__ppo_epochs", 1)
    for step in range(2):
        samples = [rollout for rollout in rollouts.load(tmp_path, step) if rollout.trained]
        loss = plain.step(samples, updates, aggregation, 2, epochs)
        assert metrics[step]["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    if updates > 1:
        assert metrics[1]["clip_rate"] > 0
    if plain.llds:
        assert metrics[1]["llds"] > 0.01
    start, ours = weights(form_llama), weights(tmp_path / "global_step_2")
    for name, parameter in plain.model.named_parameters():
        moved = float((parameter.detach() - start[name]).norm())
        assert moved > 0
        assert float((ours[name] - parameter.detach()).norm()) < 0.02 * moved, name


def test_the_samples_of_largest_variance_are_trained_on(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    """All samples are on disk and in the metrics; the advantages compare only those that are trained on."""
    sizes = {"n": 6, "actor_rollout_ref__rollout__n_train": 3, "total_training_steps": 1}
    (metrics,) = trained(form_llama, toy_parquet, tmp_path, toy_server, **sizes)
    samples = rollouts.load(tmp_path, 0)
    assert len(samples) == 4 * 6
    assert metrics["reward"] == pytest.approx(sum(rollout.score.reward for rollout in samples) / 24)
    for group in groups(samples, 6):
        rewards = [rollout.score.reward for rollout in group]
        chosen = [rollout for rollout in group if rollout.trained]
        assert chosen == [group[g] for g in max_variance_subset(rewards, 3)]
        assert [rollout.advantage for rollout in chosen] == group_advantages([r.score.reward for r in chosen], 3)
        assert all(rollout.advantage == 0 for rollout in group if not rollout.trained)


def test_a_step_begins_with_the_prompts_of_middling_difficulty(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    ranks = {f"q{i}": [1, None] if i in (3, 8, 11, 16) else [1, 1] for i in range(len(helpers.GOLDS))}
    samples = [{"qid": qid, "samples": [{"rank": rank} for rank in some]} for qid, some in ranks.items()]
    path = helpers.write_jsonl(tmp_path / "samples.jsonl", samples)
    options = {"data__samples_file": path, "total_training_steps": 1}
    trained(form_llama, toy_parquet, tmp_path / "run", toy_server, **options)
    assert {rollout.example.qid for rollout in rollouts.load(tmp_path / "run", 0)} == {"q3", "q8", "q11", "q16"}


def test_its_own_server(form_llama: Path, toy_parquet: Path, toy_index: Path, toy_server: str, tmp_path: Path) -> None:
    own = trained(form_llama, toy_parquet, tmp_path / "own", f"embedded:{toy_index}", total_training_steps=2)
    foreign = trained(form_llama, toy_parquet, tmp_path / "foreign", toy_server, total_training_steps=2)
    assert curves(own) == curves(foreign)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


def test_a_dumped_run_plays_back_to_the_same_losses(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    options = {"total_training_steps": 3, "ppo_mini_batch_size": 2, "actor_rollout_ref__rollout__n_train": 2}
    recorded = trained(form_llama, toy_parquet, tmp_path / "recorded", toy_server, **options)
    replayed = trained(  # no server, and validation has nothing to play
        form_llama,
        toy_parquet,
        tmp_path / "replayed",
        "",
        actor_rollout_ref__rollout__replay_from=tmp_path / "recorded",
        data__val_files=toy_parquet,
        trainer__test_freq=1,
        **options,
    )
    assert curves(replayed) == curves(recorded)
    assert rollouts.load(tmp_path / "replayed", 2) == rollouts.load(tmp_path / "recorded", 2)
    source = {"actor_rollout_ref__rollout__replay_from": tmp_path / "recorded"}
    error = failed(form_llama, toy_parquet, tmp_path / "other", "", trainer__seed=2, **source)
    assert "000000.parquet holds other prompts than this run draws" in error
    error = failed(form_llama, toy_parquet, tmp_path / "more", "", total_training_steps=4, **source)
    assert "000003.parquet: no rollouts of step 3 to replay" in error


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_best_checkpoint_becomes_the_model(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    options = {"total_training_steps": 5, "optim__lr": 2e-2, "trainer__save_freq": -1, "trainer__keep_checkpoints": 1}
    options |= {"data__val_files": toy_parquet, "trainer__test_freq": 1, "trainer__best_metric": "val_reward"}
    arguments = helpers.grpo_overrides(form_llama, toy_parquet, tmp_path, toy_server, **options)
    status, said = helpers.call(grpo.main, arguments)
    assert status == 0, said
    values = [record["val_reward"] for record in read_metrics(tmp_path)]
    best = values.index(max(values)) + 1
    assert best < 5  # so that it is not the last one anyway
    name = f"global_step_{best}"
    assert f"the model of {name} (val_reward={max(values):.4g}, the best) is in {tmp_path / 'model'}" in said
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == [name, "global_step_5"]
    chosen, last, model = (weights(tmp_path / folder) for folder in (name, "global_step_5", "model"))
    assert all(torch.equal(model[key], chosen[key]) for key in chosen)
    assert any(not torch.equal(model[key], last[key]) for key in chosen)
    shutil.rmtree(tmp_path / "global_step_5")  # and a run that goes on exports the same
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()  # a killed export
    status, said = helpers.call(grpo.main, arguments)
    assert f"the model of {name} " in said
    assert all(torch.equal(value, chosen[key]) for key, value in weights(tmp_path / "model").items())


class Break(Exception):
    """Stands for the end of the process."""


def test_a_broken_run_draws_and_learns_the_same(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convsearch.policy.policy import LocalPolicy

    options = {
        "total_training_steps": 6,
        "trainer__save_freq": 2,
        "data__val_files": toy_parquet,
        "data__val_max_samples": 6,
        "trainer__test_freq": 3,
        "trainer__val_before_train": True,
        "actor_rollout_ref__actor__optim__lr_warmup_steps": 3,
    }
    unbroken = trained(form_llama, toy_parquet, tmp_path / "unbroken", toy_server, **options)
    assert [record["step"] for record in unbroken] == [-1, 0, 1, 2, 3, 4, 5]

    def breaking(after: int) -> None:
        """Ends the run in the middle of a step: rollouts are on disk, the update is not."""
        original, calls = LocalPolicy.optim_step, [0]

        def optim_step(self: LocalPolicy, lr: float) -> dict[str, float]:
            calls[0] += 1
            if calls[0] > after:
                raise Break
            return original(self, lr)

        with monkeypatch.context() as patched:
            patched.setattr(LocalPolicy, "optim_step", optim_step)
            with pytest.raises(Break):
                trained(form_llama, toy_parquet, tmp_path / "broken", toy_server, **options)

    breaking(after=1)  # before the first checkpoint: starts anew
    breaking(after=3)  # in step 3: goes on from 2
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rewa')
    breaking(after=3)
    broken = trained(form_llama, toy_parquet, tmp_path / "broken", toy_server, **options)
    assert curves(broken[1:]) == curves(unbroken[1:])
    assert [record["step"] for record in broken] == [record["step"] for record in unbroken]
    for name in ("val_reward", "val_mrr", "val_format_rate"):
        assert [record.get(name) for record in broken] == [record.get(name) for record in unbroken]
    for step in range(6):
        assert rollouts.load(tmp_path / "broken", step) == rollouts.load(tmp_path / "unbroken", step)
    assert sorted(path.name for path in (tmp_path / "broken" / "rollouts").iterdir()) == [
        f"{step:06d}.parquet" for step in range(6)
    ]
    left, right = (weights(tmp_path / name / "model") for name in ("broken", "unbroken"))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_equal_rewards_teach_nothing(tiny_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path) -> None:
    """A random model never keeps the form: all rewards are the penalty, all advantages 0, and without KL and entropy
    nothing moves."""
    options = {
        "actor_rollout_ref__actor__entropy_coeff": 0,
        "actor_rollout_ref__actor__optim__weight_decay": 0,
        "total_training_steps": 2,
    }
    skip = {"actor_rollout_ref__actor__skip_zero_advantage": True}
    refill = {"algorithm__filter_groups__enable": True, "algorithm__filter_groups__max_num_gen_batches": 2}
    for number, way in enumerate(({}, skip, refill)):
        run_dir = tmp_path / str(number)
        metrics = trained(tiny_llama, toy_parquet, run_dir, toy_server, **way, **options)
        for record in metrics:
            assert record["reward"] == pytest.approx(-0.1)
            assert (record["format_rate"], record["spread_rate"], record["policy_loss"]) == (0, 0, 0)
            assert record["grad_norm"] < 1e-6
        assert {rollout.advantage for rollout in rollouts.load(run_dir, 0)} == {0.0}
        assert {rollout.score.rewrite.error for rollout in rollouts.load(run_dir, 0)} <= {
            "no_tag",
            "truncated",
            "many_tags",
            "format",
        }
        before, after = weights(tiny_llama), weights(run_dir / "model")
        assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_groups_without_advantage_can_be_left_out(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    """Without KL and entropy they have no gradient, so that leaving them out changes nothing; with them only the work
    is less."""
    options = {
        "use_kl_loss": False,
        "entropy_coeff": 0,
        "n": 2,
        "train_batch_size": 8,
        "ppo_mini_batch_size": 8,
        "total_training_steps": 3,
    }
    renamed = {
        (f"actor_rollout_ref__actor__{name}" if name in ("use_kl_loss", "entropy_coeff") else name): v
        for name, v in options.items()
    }
    kept, skipped = (
        trained(
            form_llama,
            toy_parquet,
            tmp_path / str(skip),
            toy_server,
            actor_rollout_ref__actor__skip_zero_advantage=skip,
            **renamed,
        )
        for skip in (False, True)
    )
    assert any(0 < record["spread_rate"] < 1 for record in kept)
    for left, right in zip(kept, skipped, strict=True):
        assert right["reward"] == left["reward"]
        assert right["policy_loss"] == pytest.approx(left["policy_loss"], rel=1e-4, abs=1e-6)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)


def test_other_prompts_replace_equal_groups(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    """DAPO: prompts of the step's stream follow, none twice; equal groups are left out; the run plays back."""
    sizes = {"n": 2, "train_batch_size": 8, "ppo_mini_batch_size": 8, "total_training_steps": 2, "algorithm": "dapo"}
    key = "algorithm__filter_groups__max_num_gen_batches"
    trained(form_llama, toy_parquet, tmp_path / "once", toy_server, **{key: 1}, **sizes)
    more = trained(form_llama, toy_parquet, tmp_path / "more", toy_server, **{key: 3}, **sizes)
    for step in range(2):
        drawn = groups(rollouts.load(tmp_path / "more", step), 2)
        names = [group[0].example.qid for group in drawn]
        stream = [f"q{i}" for i in stream_of(range(len(helpers.GOLDS)), 8, step, seed=1)]
        assert names == stream[: len(names)]
        assert len(names) > 8
        spread = [group[0].score.reward != group[1].score.reward for group in drawn]
        assert [[rollout.trained for rollout in group] for group in drawn] == [[differs] * 2 for differs in spread]
        assert sum(spread[:8]) < sum(spread) <= 8
        assert more[step]["spread_rate"] == pytest.approx(sum(spread) / len(spread))
    assert rollouts.load(tmp_path / "more", 0)[:16] == rollouts.load(tmp_path / "once", 0)
    played = trained(
        form_llama,
        toy_parquet,
        tmp_path / "played",
        "",
        actor_rollout_ref__rollout__replay_from=tmp_path / "more",
        **{key: 3},
        **sizes,
    )
    assert curves(played) == curves(more)
    assert rollouts.load(tmp_path / "played", 1) == rollouts.load(tmp_path / "more", 1)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_reward_rises(seed: int, form_llama: Path, toy_server: str, tmp_path: Path) -> None:
    """All gold passages are about one town of six: 24 steps find that out (measured: reward 0.5 -> 1.3 and more on each
    of three seeds)."""
    rows = helpers.grpo_rows([("rome", aspect) for aspect in helpers.ASPECTS for _ in range(6)])
    parquet = helpers.write_parquet(tmp_path / "rome.parquet", rows)
    options = {
        "train_batch_size": 8,
        "ppo_mini_batch_size": 8,
        "n": 8,
        "total_training_steps": 24,
        "trainer__save_freq": -1,
    }
    metrics = trained(form_llama, parquet, tmp_path, toy_server, trainer__seed=seed, **options)
    rewards = [record["reward"] for record in metrics]
    assert sum(rewards[-5:]) > 1.8 * sum(rewards[:5]), rewards
    assert metrics[-1]["kl"] > metrics[1]["kl"] > 0
    assert metrics[-1]["mrr"] > metrics[0]["mrr"]


def failed(model: Path, parquet: Path, run_dir: Path, url: str, **changed: Any) -> str:
    return helpers.one_sentence(
        *helpers.call(grpo.main, helpers.grpo_overrides(model, parquet, run_dir, url, **changed))
    )


def test_mistakes_are_one_sentence(
    form_llama: Path, toy_parquet: Path, toy_server: str, toy_index: Path, tmp_path: Path
) -> None:
    rows, run_dir = helpers.grpo_rows(list(helpers.GOLDS)), tmp_path / "run"

    def parquet(name: str, changed: Sequence[dict[str, Any]]) -> Path:
        return helpers.write_parquet(tmp_path / f"{name}.parquet", changed)

    no_column = parquet("column", [{key: value for key, value in row.items() if key != "reward_model"} for row in rows])
    assert f"{no_column}: column 'reward_model' is missing" in failed(form_llama, no_column, run_dir, toy_server)
    no_id = parquet("id", [row | {"extra_info": {"question": "a"}} for row in rows])
    assert "row 0 is not of the GRPO form: field 'query_id'" in failed(form_llama, no_id, run_dir, toy_server)
    unknown = parquet("unknown", [row | {"reward_model": {"ground_truth": ["atlantis"]}} for row in rows])
    assert "atlantis" in failed(form_llama, unknown, run_dir, toy_server)
    dead = f"http://127.0.0.1:{free_port()}"
    error = failed(form_llama, toy_parquet, run_dir, dead, retriever__max_wait_s=0.5)
    assert f"the retriever at {dead} did not answer" in error
    assert "python -m retriever_server" in error
    assert "retriever.url is empty" in failed(form_llama, toy_parquet, run_dir, "")
    assert str(tmp_path / "no") in failed(form_llama, toy_parquet, run_dir, f"embedded:{tmp_path / 'no'}")
    assert "samplers that share the policy's GPUs sleep" in failed(
        form_llama, toy_parquet, run_dir, toy_server, actor_rollout_ref__rollout__overlap=True
    )
    short = failed(form_llama, toy_parquet, run_dir, toy_server, max_prompt_length=5)
    assert "all 18 prompts are longer than data.max_prompt_length=5" in short
    assert not list(run_dir.glob("global_step_*"))
    assert trained(form_llama, toy_parquet, run_dir, toy_server)[-1]["step"] == 2  # a folder of failures is not spoiled


def test_a_run_folder_belongs_to_one_configuration(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    first = trained(form_llama, toy_parquet, tmp_path, toy_server)
    assert "optim.lr=0.001, now it is 0.002" in failed(form_llama, toy_parquet, tmp_path, toy_server, optim__lr=2e-3)
    assert "global_step_3" in failed(form_llama, toy_parquet, tmp_path, toy_server, trainer__resume_mode="disable")
    shutil.rmtree(tmp_path / "model")
    damaged = tmp_path / "global_step_3" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    error = failed(form_llama, toy_parquet, tmp_path, toy_server)
    assert "global_step_3 is damaged: model.safetensors" in error
    assert "delete the folder to go on from the one before it" in error
    shutil.rmtree(damaged.parent)
    assert curves(trained(form_llama, toy_parquet, tmp_path, toy_server)) == curves(first)
