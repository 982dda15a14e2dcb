"""What the policy promises.

1. Its log-probs are the sampler's; its gradient and its steps are those of plain transformers with torch's AdamW.
2. Sharing prompts, packing, micro-batches, chunks and gradient checkpointing change no gradient.
3. A gradient that is not finite is not applied, and counted.
4. Weights and optimizer state that are saved and restored continue to the last bit.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_trainers as helpers
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import scaled_dot_product_attention

from convsearch.model import distributed
from convsearch.model.batch import Branch, MicroBatch, Tree, collate, pack, unshared
from convsearch.model.loading import encode_chat, load_model, load_tokenizer
from convsearch.policy.policy import SFT_KNOBS, LocalPolicy, ResponseLogprobs, memory_advice
from convsearch.sampling.base import SamplingConfig
from convsearch.sampling.hf import HfSampler

TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


@pytest.fixture(scope="module")
def trees(folder: Path) -> list[Tree]:
    """Three prompts with four samples each, of the model itself; lengths, advantages and weights differ."""
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    prompts = [
        encode_chat(tokenizer, ({"role": "user", "content": text},))
        for text in ("rome", "where is oslo? " * 5, "lima, its food?")
    ]
    sampler = HfSampler(model, tokenizer, SamplingConfig(TEMPERATURE, max_tokens=14), tuple(range(40)))
    completions = helpers.flat(sampler.generate(prompts, 4, seed=3))
    assert len({len(completion.token_ids) for completion in completions}) > 3
    branches = [
        Branch(
            completion.token_ids,
            advantage=(number % 5 - 2) / 2,
            weight=1 / (10 + number),
            sampler_logprobs=completion.logprobs,
        )
        for number, completion in enumerate(completions)
    ]
    return [Tree(prompt, tuple(branches[4 * p : 4 * p + 4])) for p, prompt in enumerate(prompts)]


def make(folder: Path, **options: Any) -> LocalPolicy:
    return LocalPolicy(load_model(str(folder)), torch.device("cpu"), temperature=TEMPERATURE, lr=1e-3, **options)


def toy_loss(micro: MicroBatch, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Something of the policy loss, of a KL and of the entropy, so that all paths have a gradient."""
    total = (
        micro.weights_R * (-micro.advantages_R * logprobs_R.exp() + 0.1 * logprobs_R.square() - 0.3 * entropy_R)
    ).sum()
    return total, {"loss": float(total.detach())}


def gradients(policy: LocalPolicy, micros: Sequence[MicroBatch]) -> dict[str, Tensor]:
    policy.module.zero_grad(set_to_none=True)
    for micro in micros:
        policy.forward_backward(micro, toy_loss)
    return {
        name: parameter.grad.clone()
        for name, parameter in policy.named_parameters().items()
        if parameter.grad is not None
    }


def plain_loss(model: Any, trees: Sequence[Tree]) -> Tensor:
    """The same loss, sequence by sequence, from a model as transformers gives it."""
    total = torch.zeros(())
    for tree in trees:
        for branch in tree.branches:
            logits_TV = model(torch.tensor([[*tree.prompt_ids, *branch.token_ids]])).logits[
                0, len(tree.prompt_ids) - 1 : -1
            ]
            logprobs_TV = (logits_TV.float() / TEMPERATURE).log_softmax(-1)
            logprobs_T = logprobs_TV.gather(1, torch.tensor(branch.token_ids)[:, None])[:, 0]
            entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
            total = (
                total
                + branch.weight
                * (-branch.advantage * logprobs_T.exp() + 0.1 * logprobs_T.square() - 0.3 * entropy_T).sum()
            )
    return total


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def assert_equal_gradients(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        distance = float((left[name] - right[name]).norm() / right[name].norm())
        assert distance <= tolerance, (name, distance)


def test_logprobs_are_the_samplers(folder: Path, trees: list[Tree]) -> None:
    policy = make(folder)
    for micro in [collate(trees), *pack(trees, 80), *pack(unshared(trees), 100)]:
        assert micro.sampler_logprobs_R is not None
        torch.testing.assert_close(policy.logprobs(micro), micro.sampler_logprobs_R, atol=1e-4, rtol=0)


def test_gradients_are_those_of_plain_transformers(folder: Path, trees: list[Tree]) -> None:
    model = plain_model(folder)
    loss = plain_loss(model, trees)
    torch.autograd.backward(loss)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    policy = make(folder)
    report = policy.forward_backward(collate(trees), toy_loss)
    assert report["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_equal_gradients(gradients(policy, [collate(trees)]), expected)


@pytest.mark.parametrize(
    "split",
    [
        pytest.param(lambda trees: [collate(unshared(trees))], id="unshared"),
        pytest.param(lambda trees: [collate([tree]) for tree in trees], id="a tree at a time"),
        pytest.param(lambda trees: [collate([tree]) for tree in unshared(trees)], id="a sequence at a time"),
        pytest.param(lambda trees: list(pack(trees, 10_000)), id="packed, one"),
        pytest.param(lambda trees: list(pack(trees, 1)), id="packed, least"),
        pytest.param(lambda trees: list(pack(unshared(trees), 90)), id="packed, unshared"),
        pytest.param(lambda trees: list(pack(trees, 10_000, remove_padding=True)), id="one row"),
        pytest.param(lambda trees: list(pack(trees, 10_000, world_size=2, remove_padding=True)), id="a row a rank"),
        pytest.param(lambda trees: list(pack(trees, 130, remove_padding=True)), id="short rows"),
        pytest.param(
            lambda trees: list(pack(unshared(trees), 150, world_size=3, remove_padding=True)), id="unshared rows"
        ),
        pytest.param(lambda trees: [collate(trees, pad_id=5)], id="other padding"),
        pytest.param(lambda trees: [collate(trees[::-1])], id="other order"),
    ],
)
def test_the_split_changes_no_gradient(
    folder: Path, trees: list[Tree], split: Callable[[list[Tree]], list[MicroBatch]]
) -> None:
    policy = make(folder)
    assert_equal_gradients(gradients(policy, split(trees)), gradients(policy, [collate(trees)]))


def test_flash_attention_is_given_the_sequences(
    folder: Path, trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call, played by SDPA: every sequence of unshared rows, without the padding between rows; gradients as without
    it."""
    types: list[torch.dtype] = []

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        assert torch.equal(cu_q, cu_k)
        assert (causal, max_q, cu_q[0].item(), cu_q[-1].item()) == (True, int(cu_q.diff().max()), 0, len(q))
        types.extend(tensor.dtype for tensor in (q, k, v))
        pieces = []
        for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
            one = (tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v))
            pieces.append(
                scaled_dot_product_attention(*one, is_causal=True, scale=softmax_scale, enable_gqa=True)[0].transpose(
                    0, 1
                )
            )
        return torch.cat(pieces)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    plain, flash = make(folder), make(folder)
    flash.module.kernel = "flash"
    micros = list(pack(unshared(trees), 150, world_size=3, remove_padding=True))
    assert any(bool((micro.branch_BT < 0).any()) for micro in micros)
    assert_equal_gradients(gradients(flash, micros), gradients(plain, micros))
    types.clear()
    half = make(folder, bf16=True)
    half.module.kernel = "flash"
    assert float((half.logprobs(micros[0]) - plain.logprobs(micros[0])).abs().mean()) < 0.1
    assert set(types) == {torch.bfloat16}  # its kernel takes nothing else


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_sees_what_the_masks_show(folder: Path, trees: list[Tree]) -> None:
    plain, flex = make(folder), make(folder)
    flex.module.kernel = "flex"
    for micro in [
        *pack(trees, 10_000, remove_padding=True),
        collate(trees),
        *pack(unshared(trees), 150, world_size=2, remove_padding=True),
    ]:
        torch.testing.assert_close(flex.logprobs(micro), plain.logprobs(micro), atol=1e-5, rtol=0)


def test_packing_keeps_to_its_limit(trees: list[Tree]) -> None:
    rows = unshared(trees)
    for limit in (1, 60, 100, 400):
        micros = list(pack(rows, limit))
        assert sum(len(micro.token_ids_BT) for micro in micros) == len(rows)
        assert all(micro.num_tokens <= limit or len(micro.token_ids_BT) == 1 for micro in micros)
        assert not any((micro.branch_BT < 0).any() for micro in pack(rows, limit, remove_padding=True))


def test_gradient_checkpointing_changes_no_gradient(folder: Path, trees: list[Tree]) -> None:
    plain, checkpointed = make(folder), make(folder, gradient_checkpointing=True)
    layers_seen = []
    layer = checkpointed.causal_lm.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: layers_seen.append(1))
    assert_equal_gradients(gradients(checkpointed, [collate(trees)]), gradients(plain, [collate(trees)]), 1e-6)
    assert len(layers_seen) == 2  # once forward, once again in the backward pass


def test_chunks_of_the_scores_change_no_gradient(folder: Path, trees: list[Tree]) -> None:
    whole, pieces = make(folder), make(folder)
    assert isinstance(pieces.module, ResponseLogprobs)
    pieces.module.chunk = 7
    torch.testing.assert_close(pieces.logprobs(collate(trees)), whole.logprobs(collate(trees)), atol=5e-6, rtol=0)
    assert_equal_gradients(gradients(pieces, [collate(trees)]), gradients(whole, [collate(trees)]))


def test_steps_are_those_of_torch(folder: Path, trees: list[Tree]) -> None:
    """Clipping before AdamW, the learning rate of each step, and weight decay on every parameter."""
    model = plain_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9), weight_decay=0.1)
    policy = make(folder, betas=(0.8, 0.9), weight_decay=0.1, grad_clip=0.05)
    for lr in (1e-3, 3e-3, 2e-3):
        torch.autograd.backward(plain_loss(model, trees))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        policy.forward_backward(collate(trees), toy_loss)
        report = policy.optim_step(lr)
        assert report == {"grad_norm": pytest.approx(float(norm), rel=1e-4), "lr": lr, "skipped": 0.0, "broken": 0.0}
        assert report["grad_norm"] > 0.05
    ours = policy.weights()
    for name, parameter in model.named_parameters():
        assert float((ours[name] - parameter.detach()).norm() / parameter.detach().norm()) < 1e-5, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_applied(folder: Path, trees: list[Tree], bad: float) -> None:
    policy, undisturbed = make(folder), make(folder)
    micro = collate(trees)
    poisoned = replace(micro, weights_R=micro.weights_R.clone().index_fill_(0, torch.tensor([3]), bad))
    for policy_, micros in ((policy, (micro, poisoned, micro)), (undisturbed, (micro, micro))):
        reports = []
        for each in micros:
            policy_.forward_backward(each, toy_loss)
            reports.append(policy_.optim_step(1e-3))
        assert [report["skipped"] for report in reports] == [float(each is poisoned) for each in micros]
    expected = undisturbed.weights()
    assert all(torch.equal(value, expected[name]) for name, value in policy.weights().items())


def test_weights_and_optimizer_state_go_round(folder: Path, trees: list[Tree]) -> None:
    def step(policy: LocalPolicy) -> None:
        policy.forward_backward(collate(trees), toy_loss)
        policy.optim_step(1e-3)

    first = make(folder)
    assert first.optimizer_state() == {}
    step(first)
    step(first)
    weights, state = first.weights(), first.optimizer_state()
    assert {name.split("/")[0] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert float(next(value for name, value in state.items() if name.startswith("step/"))) == 2
    second = make(folder)
    second.causal_lm.load_state_dict(weights, strict=False)
    second.load_optimizer_state(state)
    step(first)  # the state is a copy: this must not reach into it
    step(second)
    assert all(torch.equal(value, second.weights()[name]) for name, value in first.weights().items())
    assert all(torch.equal(value, second.optimizer_state()[name]) for name, value in first.optimizer_state().items())


def test_a_frozen_model_scores_and_takes_no_step(folder: Path, trees: list[Tree]) -> None:
    frozen = LocalPolicy(load_model(str(folder)).requires_grad_(False), torch.device("cpu"), temperature=TEMPERATURE)
    assert torch.equal(frozen.logprobs(collate(trees)), make(folder).logprobs(collate(trees)))
    with pytest.raises(AssertionError, match="takes no step"):
        frozen.optim_step(1e-3)


def test_bfloat16_arithmetic_is_near_and_keeps_float32_weights(folder: Path, trees: list[Tree]) -> None:
    policy = make(folder, bf16=True)
    exact, rough = make(folder).logprobs(collate(trees)), policy.logprobs(collate(trees))
    assert 0 < float((exact - rough).abs().mean()) < 0.1
    policy.forward_backward(collate(trees), toy_loss)
    policy.optim_step(1e-3)
    assert {value.dtype for value in [*policy.weights().values(), *policy.optimizer_state().values()]} == {
        torch.float32
    }


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone, so that FSDP2 shards over a mesh of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@contextmanager
def sharded_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is built in here comes under FSDP2 although there is one rank."""
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "world_size", lambda: 2)
        patched.setattr(distributed, "init_device_mesh", lambda kind, _: DeviceMesh(kind, [0]))
        yield


def sharded(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> LocalPolicy:
    with sharded_world(monkeypatch):
        return make(folder, **options)


@pytest.mark.usefixtures("one_rank")
def test_sharding_changes_no_gradient_and_no_step(
    folder: Path, trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fsdp = make(folder), sharded(folder, monkeypatch, gradient_checkpointing=True)
    assert distributed.is_sharded(fsdp.module)
    for micro in pack(trees, 200, remove_padding=True):
        assert torch.equal(fsdp.logprobs(micro), plain.logprobs(micro))
        reports = [policy.forward_backward(micro, toy_loss) for policy in (plain, fsdp)]
        assert reports[0] == reports[1]
        assert fsdp.optim_step(1e-3) == plain.optim_step(1e-3)
    assert all(torch.equal(value, fsdp.weights()[name]) for name, value in plain.weights().items())


@pytest.mark.usefixtures("one_rank")
def test_mixed_precision_multiplies_in_bfloat16_and_keeps_float32(
    folder: Path, trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mixed = make(folder), sharded(folder, monkeypatch, bf16=True)
    micro = collate(trees)
    seen = set()
    mixed.causal_lm.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: seen.add((module.weight.dtype, output.dtype))
    )
    assert 0 < float((mixed.logprobs(micro) - plain.logprobs(micro)).abs().mean()) < 0.1
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    mixed.forward_backward(micro, toy_loss)
    grads = {parameter.grad.dtype for parameter in mixed.named_parameters().values() if parameter.grad is not None}
    mixed.optim_step(1e-3)
    assert grads | {value.dtype for value in [*mixed.weights().values(), *mixed.optimizer_state().values()]} == {
        torch.float32
    }


def test_running_out_of_memory_says_which_knob_to_turn(folder: Path, trees: list[Tree]) -> None:
    policy, micro = make(folder), collate(trees)

    def greedy(*_: Any) -> tuple[Tensor, dict[str, float]]:
        return torch.empty(1 << 60), {}

    with pytest.raises(
        ValueError,
        match=rf"^out of memory in a forward and backward pass over {micro.num_tokens} positions: .*ppo_max_token_len",
    ):
        policy.forward_backward(micro, greedy)
    with pytest.raises(ValueError, match=r"data\.micro_batch_size_per_gpu"), memory_advice("a test", SFT_KNOBS):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(RuntimeError, match="another"), memory_advice("a test", SFT_KNOBS):
        raise RuntimeError("another")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [{"param_offload": True}, {"optimizer_offload": True}, {"param_offload": True, "optimizer_offload": True}],
)
def test_offloading_changes_no_step(folder: Path, trees: list[Tree], options: dict[str, bool]) -> None:
    """On a GPU: what lives in CPU memory between uses does so, and the steps are those without it."""
    gpu = torch.device("cuda")
    plain, offloaded = (
        LocalPolicy(load_model(str(folder)), gpu, temperature=TEMPERATURE, **each) for each in ({}, options)
    )
    for micro in pack(trees, 200, remove_padding=True):
        torch.testing.assert_close(offloaded.logprobs(micro), plain.logprobs(micro), atol=1e-4, rtol=0)
        for policy in (plain, offloaded):
            policy.forward_backward(micro, toy_loss)
            policy.optim_step(1e-3)
    assert offloaded.optimizer is not None
    assert {
        value.device.type for state in offloaded.optimizer.state.values() for value in state.values() if value.dim()
    } == {"cpu"}
    expected = plain.weights()
    for name, value in offloaded.weights().items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-4, name
    resumed = LocalPolicy(load_model(str(folder)), gpu, temperature=TEMPERATURE, **options)
    resumed.load_optimizer_state(offloaded.optimizer_state())
    resumed.forward_backward(collate(trees), toy_loss)
    assert resumed.optim_step(1e-3)["skipped"] == 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["flex", "auto"])
def test_kernels_of_the_gpu_change_no_gradient(folder: Path, trees: list[Tree], kernel: Any) -> None:
    gpu = torch.device("cuda")
    plain, fast = (LocalPolicy(load_model(str(folder)), gpu, temperature=TEMPERATURE) for _ in range(2))
    plain.module.kernel, fast.module.kernel = "sdpa", kernel
    micros = list(pack(trees, 10_000, remove_padding=True))
    assert_equal_gradients(gradients(fast, micros), gradients(plain, micros), 1e-3)
