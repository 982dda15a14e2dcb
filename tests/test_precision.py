"""Arithmetic in bfloat16 beside float32 weights: what the two copies hold, and which one leaves the trainer."""

from pathlib import Path

import helpers_trainers as helpers
import pytest
import torch
from test_policy import TEMPERATURE, toy_loss
from torch import Tensor, nn

from convsearch.config import load_grpo_config
from convsearch.config.grpo import PolicyModelConfig
from convsearch.model.batch import Branch, Tree, collate
from convsearch.model.loading import encode_chat, load_model, load_tokenizer
from convsearch.model.precision import Masters, cast, pick_dtype, settled
from convsearch.policy.policy import LocalPolicy
from convsearch.sampling.base import SamplingConfig
from convsearch.sampling.build import hf_sampler
from convsearch.sampling.hf import HfSampler

CPU = torch.device("cpu")
TREES = [Tree((5, 6, 7, 8), (Branch((9, 10, 11), 1.0, 0.1), Branch((12, 13), -0.5, 0.2)))]


class Toy(nn.Module):
    """Two products with one tied weight, a frozen weight and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(1, 1, bias=False) for _ in range(2))
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.tensor([[2.0]]), requires_grad=False)
        self.register_buffer("frequency", torch.tensor([1 / 3]))
        nn.init.ones_(self.first.weight)

    def forward(self, x: float, y: float = 0.0) -> Tensor:
        """x w + y w 2"""
        kind = self.first.weight.dtype
        return self.first(torch.tensor([[x]], dtype=kind)) + self.second(torch.tensor([[y]], dtype=kind)) * self.frozen


def test_gradients_add_up_in_float32() -> None:
    """256 + 1 is 256 in bfloat16, which has 8 significant bits."""
    module = Toy()
    masters = Masters(module)
    assert list(masters.named) == ["frozen", "first.weight"]  # the tied weight once
    master = masters.named["first.weight"]
    for factor, total in ((256.0, 256.0), (1.0, 257.0), (1.0, 258.0)):
        torch.autograd.backward(module(factor))
        assert master.grad is not None
        assert (master.grad.dtype, master.grad.item()) == (torch.float32, total)
        assert module.first.weight.grad is None
    assert torch.tensor([256.0], dtype=torch.bfloat16) + 1 == 256
    master.grad = None
    torch.autograd.backward(module(3.0, 5.0))
    assert master.grad is not None
    assert master.grad.item() == 3 + 5 * 2  # from both places of the tied weight


def test_frozen_weights_get_no_gradient_and_buffers_stay_in_float32() -> None:
    module = Toy()
    masters = Masters(module)
    torch.autograd.backward(module(1.0, 1.0))
    assert (masters.named["frozen"].requires_grad, masters.named["frozen"].grad) == (False, None)
    assert module.second.weight is module.first.weight
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in masters.named.values()} == {torch.float32}
    assert torch.equal(module.frequency, torch.tensor([1 / 3]))


def test_published_weights_are_the_rounded_masters() -> None:
    """Steps of 1/512 are too small for a bfloat16 number near 1, whose neighbour is 1 + 1/128; they add up."""
    module = Toy()
    masters = Masters(module)
    with torch.no_grad():
        for steps, published in ((1, 1.0), (2, 1.0), (3, 1 + 1 / 128), (4, 1 + 1 / 128)):
            masters.named["first.weight"] += 1 / 512
            masters.publish()
            assert masters.named["first.weight"].item() == 1 + steps / 512
            assert module.first.weight.item() == module.second.weight.item() == published


def policy_of(folder: Path, *, bf16: bool = True) -> LocalPolicy:
    return LocalPolicy(load_model(str(folder)), CPU, temperature=TEMPERATURE, lr=1e-3, bf16=bf16)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen2"])
def test_what_leaves_a_policy_are_the_float32_weights(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    policy, exact = policy_of(folder), policy_of(folder, bf16=False)
    before = exact.weights()
    assert policy.weights().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in policy.weights().items())  # not rounded
    buffers = {name: (value.dtype, value.tolist()) for name, value in policy.module.named_buffers()}
    assert buffers == {name: (torch.float32, value.tolist()) for name, value in exact.module.named_buffers()}
    for _ in range(2):
        policy.forward_backward(collate(TREES), toy_loss)
        assert policy.optim_step(1e-3)["grad_norm"] > 0
    after, computed = policy.weights(), dict(policy.causal_lm.named_parameters())
    assert not any(torch.equal(value, before[name]) for name, value in after.items())
    assert all(torch.equal(computed[name], value.to(torch.bfloat16)) for name, value in after.items())
    assert not all(torch.equal(computed[name].float(), value) for name, value in after.items())
    tied = policy.causal_lm.config.tie_word_embeddings
    assert (policy.causal_lm.lm_head.weight is policy.causal_lm.model.embed_tokens.weight) == tied


def test_a_model_that_is_loaded_in_bfloat16_is_the_cast_one(tiny_llama: Path) -> None:
    """So the rewriter of inference computes as the policy did."""
    loaded, model = load_model(str(tiny_llama), torch.bfloat16), load_model(str(tiny_llama))
    cast(model)
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, loaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.mark.parametrize(
    ("avx512", "amx", "chosen"), [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    avx512: bool, amx: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert pick_dtype("auto", CPU) == types[chosen]
    section = PolicyModelConfig(path="m", dtype="auto", lora_rank=3)
    assert settled(section, CPU) == section.model_copy(update={"dtype": chosen})
    for name, kind in types.items():  # a name is obeyed, whatever the processor
        assert pick_dtype(name, CPU) == kind
        assert settled(PolicyModelConfig(path="m", dtype=name), CPU).dtype == name


@pytest.mark.parametrize(("capability", "kind"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_on_a_gpu(capability: tuple[int, int], kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda")) == kind


@pytest.mark.parametrize(("asked", "bf16"), [("fp32", True), ("bf16", False)])
def test_a_sampler_with_the_weights_of_the_policy_computes_in_its_type(
    asked: str, bf16: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    tokenizer, shared = load_tokenizer(str(tiny_llama)), policy_of(tiny_llama, bf16=bf16).causal_lm
    overrides = helpers.grpo_overrides(tiny_llama, tmp_path / "train.parquet", tmp_path, "")
    other = {"fp32": "bf16", "bf16": "fp32"}[asked]
    assert hf_sampler(load_grpo_config([*overrides, f"actor_rollout_ref.rollout.dtype={other}"]), shared, tokenizer)
    error = rf"rollout.dtype={asked}, but the sampler hf .* in {shared.dtype}: set actor_rollout_ref.model.dtype to"
    with pytest.raises(ValueError, match=error):
        hf_sampler(load_grpo_config([*overrides, f"actor_rollout_ref.rollout.dtype={asked}"]), shared, tokenizer)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen2"])
def test_a_bfloat16_sampler_is_near_its_policy(kind: str, request: pytest.FixtureRequest) -> None:
    """Both have the same rounded weights, but add in another order, so that some sums are rounded to a neighbour.

    Neighbours in bfloat16 are 2^-8 to 2^-7 of a number apart. For the log-prob of a token, the largest number is its
    largest logit over the temperature: on average the two log-probs differ by less than one such step. They differ less
    than the sampler and a policy in float32, whose weights are not rounded.
    """
    folder: Path = request.getfixturevalue(kind)
    tokenizer, policy = load_tokenizer(str(folder)), policy_of(folder)
    texts = ("rome", "where is oslo? " * 5, "lima, its food?")
    prompts = [encode_chat(tokenizer, ({"role": "user", "content": text},)) for text in texts]
    sampler = HfSampler(policy.causal_lm, tokenizer, SamplingConfig(TEMPERATURE, max_tokens=32), ())
    groups = sampler.generate(prompts, 8, seed=3)
    trees = [
        Tree(prompt, tuple(Branch(c.token_ids, sampler_logprobs=c.logprobs) for c in group))
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    micro = collate(trees)
    assert micro.sampler_logprobs_R is not None
    gap, gap_to_float32 = (
        float((each.logprobs(micro) - micro.sampler_logprobs_R).abs().mean())
        for each in (policy, policy_of(folder, bf16=False))
    )
    largest_R: list[Tensor] = []
    head = policy.causal_lm.lm_head
    hook = head.register_forward_hook(lambda _, __, logits_RV: largest_R.append(logits_RV.float().abs().amax(-1)))
    policy.logprobs(micro)
    hook.remove()
    step = float(torch.cat(largest_R).mean()) / TEMPERATURE * 2**-8
    print(f"\n{kind}: sampler_gap {gap:.4f} in bfloat16 (limit {step:.4f}), to float32 {gap_to_float32:.4f}")
    assert gap < min(step, gap_to_float32)
