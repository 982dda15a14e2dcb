"""LoRA: adapters beside frozen weights, against the chain rule on plain transformers' gradients.

1. New adapters change nothing; the reference is the base model, whatever the adapters have learned.
2. dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from the model without adapters; nothing else has a gradient.
3. What leaves the trainer is merged, under the model's own names; adapters and moments go round through the optimizer's
state.
4. A run with adapters trains, resumes exactly, and exports a plain model.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_grpo import curves, trained
from test_policy import TEMPERATURE, gradients, make, one_rank, sharded_world, toy_loss

from convsearch.config import load_grpo_config
from convsearch.model import lora
from convsearch.model.batch import Branch, Tree, pack
from convsearch.model.loading import load_model
from convsearch.policy.policy import BaseReference, LocalPolicy

pytest.importorskip("peft", reason="peft is not installed: pip install 'convsearch[lora]'")
__all__ = ["one_rank"]  # a fixture
TREES = [
    Tree((5, 6, 7, 8), (Branch((9, 10, 11), 1.0, 0.1), Branch((12, 13), -0.5, 0.2))),
    Tree((14, 15), (Branch((16,), 2.0, 0.3), Branch((17, 18, 19, 20), 0.5, 0.1))),
]


def adapted(folder: Path, **options: Any) -> LocalPolicy:
    model = load_model(str(folder))
    lora.add_adapters(model, rank=4, alpha=8)
    return LocalPolicy(model, torch.device("cpu"), temperature=TEMPERATURE, **options)


@pytest.fixture(params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def taught(folder: Path, steps: int = 2, **options: Any) -> LocalPolicy:
    policy = adapted(folder, **options)
    for _ in range(steps):
        for micro in pack(TREES, 100, remove_padding=True):
            policy.forward_backward(micro, toy_loss)
        policy.optim_step(1e-2)
    return policy


def test_the_reference_is_the_base_model(folder: Path) -> None:
    (micro,) = pack(TREES, 100, remove_padding=True)
    base = make(folder).logprobs(micro)
    assert torch.equal(adapted(folder).logprobs(micro), base)
    policy = taught(folder)
    assert float((policy.logprobs(micro) - base).abs().max()) > 1e-3
    assert torch.equal(BaseReference(policy).logprobs(micro), base)
    assert not torch.equal(policy.logprobs(micro), base)


def test_adapters_in_bfloat16_learn_and_go_round(folder: Path) -> None:
    """Through the float32 copies of the adapters, which a resumed run computes with at once, rounded."""
    (micro,) = pack(TREES, 100, remove_padding=True)
    policy, again, frozen = taught(folder, bf16=True), adapted(folder, bf16=True), make(folder, bf16=True)
    base = frozen.logprobs(micro)
    assert not torch.equal(policy.logprobs(micro), base)
    assert torch.equal(BaseReference(policy).logprobs(micro), base)
    again.load_optimizer_state(policy.optimizer_state())
    assert torch.equal(again.logprobs(micro), policy.logprobs(micro))
    for each in (policy, again):
        each.forward_backward(micro, toy_loss)
        each.optim_step(1e-2)
    assert torch.equal(policy.logprobs(micro), again.logprobs(micro))
    whole, plain = policy.weights(), make(folder).weights()
    assert all(torch.equal(value, again.weights()[name]) for name, value in whole.items())
    assert {value.dtype for value in whole.values()} == {torch.float32}
    untouched = [name for name in whole if "embed" in name or "norm" in name]
    assert all(torch.equal(whole[name], plain[name]) for name in untouched)  # frozen weights are not rounded


def test_gradients_equal_the_chain_rule(folder: Path) -> None:
    policy = taught(folder)
    micros = list(pack(TREES, 8, remove_padding=True))
    plain = make(folder)
    plain.causal_lm.load_state_dict(policy.weights(), strict=False)
    full, own, tensors = gradients(plain, micros), gradients(policy, micros), dict(policy.named_parameters())
    assert set(own) == set(lora.adapter_tensors(tensors))
    assert len(own) == 2 * 7 * 2  # seven linear layers in each of two blocks
    for name, gradient in own.items():
        layer, _, which = name.partition(".lora_")
        a, b = tensors[f"{layer}.lora_A.default.weight"].detach(), tensors[f"{layer}.lora_B.default.weight"].detach()
        weight = full[f"{layer}.weight"]
        expected = 2.0 * weight @ a.T if which[0] == "B" else 2.0 * b.T @ weight
        assert float((gradient - expected).norm() / expected.norm()) < 1e-4, name


def test_weights_are_merged_and_the_optimizer_state_is_restored(folder: Path) -> None:
    (micro,) = pack(TREES, 100, remove_padding=True)
    policy = taught(folder)
    plain, again = make(folder), adapted(folder)
    weights = policy.weights()
    assert set(weights) == set(plain.weights())
    plain.causal_lm.load_state_dict(weights, strict=False)
    torch.testing.assert_close(plain.logprobs(micro), policy.logprobs(micro), atol=1e-5, rtol=0)
    again.load_optimizer_state(policy.optimizer_state())
    for each in (policy, again):
        each.forward_backward(micro, toy_loss)
        each.optim_step(1e-2)
    assert all(torch.equal(value, again.optimizer_state()[name]) for name, value in policy.optimizer_state().items())
    assert torch.equal(policy.logprobs(micro), again.logprobs(micro))


@pytest.mark.slow
def test_a_run_with_adapters_resumes_and_exports(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    options = {"actor_rollout_ref__model__lora_rank": 4, "actor_rollout_ref__actor__optim__lr": 1e-2}
    whole = trained(form_llama, toy_parquet, tmp_path / "whole", toy_server, **options)
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert whole[2]["kl"] > 1e-6  # against the base: the adapters are off for the reference
    assert max(record["sampler_gap"] for record in whole) < 1e-3
    trained(form_llama, toy_parquet, tmp_path / "broken", toy_server, **options)
    shutil.rmtree(tmp_path / "broken" / "global_step_3")
    shutil.rmtree(tmp_path / "broken" / "model")
    assert curves(trained(form_llama, toy_parquet, tmp_path / "broken", toy_server, **options)) == curves(whole)
    with (
        safe_open(tmp_path / "broken" / "model" / "model.safetensors", "pt") as ours,
        safe_open(form_llama / "model.safetensors", "pt") as base,
    ):
        assert set(ours.keys()) == set(base.keys())


def test_a_missing_peft_names_the_extra(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank needs peft: pip install 'convsearch\[lora\]'"):
        lora.add_adapters(load_model(str(tiny_llama)), 4, 8)


@pytest.mark.usefixtures("one_rank")
def test_sharded_adapters_learn_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 over frozen and trained parameters, on a mesh of one."""
    (micro,) = pack(TREES, 100, remove_padding=True)
    plain = taught(folder, 1)
    model = load_model(str(folder))
    lora.add_adapters(model, rank=4, alpha=8)
    with sharded_world(monkeypatch):
        fsdp = LocalPolicy(model, torch.device("cpu"), temperature=TEMPERATURE)
    fsdp.forward_backward(micro, toy_loss)
    fsdp.optim_step(1e-2)
    assert torch.equal(BaseReference(fsdp).logprobs(micro), BaseReference(plain).logprobs(micro))
    torch.testing.assert_close(fsdp.logprobs(micro), plain.logprobs(micro), atol=1e-5, rtol=0)
    assert set(fsdp.weights()) == set(plain.weights())


def test_adapters_need_checkpoint_format_safetensors() -> None:
    keys = [
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.path=m",
        "data.train_files=a",
        "trainer.n_gpus_per_node=2",
    ]
    error = "lora_rank=8 with trainer.checkpoint_format=auto on 2 ranks: .*set trainer.checkpoint_format=safetensors$"
    with pytest.raises(ValueError, match=error):
        load_grpo_config(keys)
    assert load_grpo_config([*keys, "trainer.checkpoint_format=safetensors"]).actor_rollout_ref.model.lora_rank == 8
