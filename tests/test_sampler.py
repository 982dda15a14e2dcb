"""What the sampler promises.

1. Its log-probs are those of plain transformers on prompt + completion; greedy decoding is transformers' own.
2. A sample depends on seed, key and number alone: not on the batch, the chunking, or what prompts have in common.
3. Tokens are drawn from the distribution; one of probability 0 never is.
4. The scaffold keeps the form, whatever the model says.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.generation.rewriter import Rewriter
from convsearch.model.attention import DecodeContext
from convsearch.model.loading import encode_chat, load_model, load_tokenizer, stop_token_ids
from convsearch.parsing import parse_rewrite
from convsearch.sampling import hf as module
from convsearch.sampling.base import SamplingConfig, Tensors
from convsearch.sampling.hf import HfSampler, _inverse_cdf
from convsearch.sampling.scaffold import Scaffold
from convsearch.types import Completion, Conversation

CHATS = (
    "Q: where is rome? Q: its food?",
    "oslo",
    "Q: where is lima?\nQ: its rivers? and its history? and its food?",
    "tokyo tokyo tokyo",
)


class World:
    """A model folder opened twice: by the sampler, and as transformers has it."""

    def __init__(self, folder: Path):
        self.folder, self.tokenizer = folder, load_tokenizer(str(folder))
        self.model = load_model(str(folder))
        self.stop_ids = stop_token_ids(self.model, self.tokenizer)
        self.prompts = [encode_chat(self.tokenizer, ({"role": "user", "content": text},)) for text in CHATS]

    def sampler(
        self, config: SamplingConfig, scaffold: Scaffold | None = None, stop_ids: tuple[int, ...] | None = None
    ) -> HfSampler:
        return HfSampler(self.model, self.tokenizer, config, self.stop_ids if stop_ids is None else stop_ids, scaffold)

    def plain(self, attention: str = "eager") -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> World:
    return World(tiny_llama)


@pytest.fixture(scope="module")
def qwen2(tiny_qwen2: Path) -> World:
    return World(tiny_qwen2)


@torch.no_grad()
def plain_logprobs(model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[float]:
    logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)
    return logprobs_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_plain_transformers(
    kind: str, attention: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    world: World = request.getfixturevalue(kind)
    plain = world.plain(attention)
    completions = helpers.flat(
        world.sampler(SamplingConfig(temperature, max_tokens=12)).generate(world.prompts, 3, seed=5)
    )
    assert len({completion.token_ids for completion in completions}) == 12
    for number, completion in enumerate(completions):
        expected = plain_logprobs(plain, world.prompts[number // 3], completion.token_ids, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    spread = np.ptp([logprob for completion in completions for logprob in completion.logprobs])
    assert spread > 2  # an almost uniform model would make the comparison an easy one


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_is_transformers_generate(kind: str, penalty: float, request: pytest.FixtureRequest) -> None:
    world: World = request.getfixturevalue(kind)
    plain = world.plain("sdpa")
    ours = helpers.flat(
        world.sampler(SamplingConfig(0.0, max_tokens=20, repetition_penalty=penalty)).generate(world.prompts, 1, seed=0)
    )
    for prompt, completion in zip(world.prompts, ours, strict=True):
        options = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": penalty}
        theirs = plain.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        assert completion.token_ids == tuple(theirs[0, len(prompt) :].tolist())


def same(left: Completion, right: Completion) -> None:
    assert (left.token_ids, left.text, left.finish_reason) == (right.token_ids, right.text, right.finish_reason)
    assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5)


def test_a_sample_does_not_depend_on_its_batch(llama: World) -> None:
    keys = [11, 22, 33, 44]
    together = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=10)).generate(llama.prompts, 3, seed=9, keys=keys)
    )
    alone = [
        helpers.flat(llama.sampler(SamplingConfig(1.0, max_tokens=10)).generate([p], 3, 9, [k]))
        for p, k in zip(llama.prompts, keys, strict=True)
    ]
    small = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=10, batch_size=6)).generate(llama.prompts, 3, seed=9, keys=keys)
    )
    fewer = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=10)).generate(llama.prompts, 2, seed=9, keys=keys)
    )
    for number, completion in enumerate(together):
        same(completion, alone[number // 3][number % 3])
        same(completion, small[number])
        if number % 3 < 2:
            same(completion, fewer[number // 3 * 2 + number % 3])


def test_seed_key_and_number_all_matter(llama: World) -> None:
    sampler = llama.sampler(SamplingConfig(1.0, max_tokens=8))
    twice = helpers.flat(sampler.generate([llama.prompts[0], llama.prompts[0]], 2, seed=1))  # one prompt under two keys
    other = helpers.flat(sampler.generate([llama.prompts[0]], 2, seed=2))
    assert len({completion.token_ids for completion in [*twice, *other]}) == 6
    assert [c.token_ids for c in helpers.flat(sampler.generate([llama.prompts[0]], 2, seed=1))] == [
        c.token_ids for c in twice[:2]
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_reading_the_common_prefix_once_changes_nothing(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: World = request.getfixturevalue(kind)
    prompts = [world.prompts[0] + (tail,) * (tail % 5) for tail in (70, 71, 72, 74)] + [world.prompts[0]]
    shared = module._common_prefix(prompts)
    assert shared == len(world.prompts[0]) - 1  # one prompt is a prefix of the others: its last token is left
    with_sharing = helpers.flat(world.sampler(SamplingConfig(1.0, max_tokens=10)).generate(prompts, 2, seed=3))
    monkeypatch.setattr(module, "_common_prefix", lambda prompts: 0)
    without = helpers.flat(world.sampler(SamplingConfig(1.0, max_tokens=10)).generate(prompts, 2, seed=3))
    for left, right in zip(with_sharing, without, strict=True):
        same(left, right)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=2, max_size=5))
def test_common_prefix(prompts: list[tuple[int, ...]]) -> None:
    shared = module._common_prefix(prompts)
    assert len({prompt[:shared] for prompt in prompts}) == 1
    assert shared < min(map(len, prompts))
    assert shared == min(map(len, prompts)) - 1 or len({prompt[: shared + 1] for prompt in prompts}) > 1


def test_inverse_cdf_draws_every_token_as_often_as_it_is_probable() -> None:
    probs = torch.tensor([0.0, 0.125, 0.0, 0.0, 0.5, 0.25, 0.0, 0.125, 0.0])
    draws = 1 << 14
    uniforms = (torch.arange(draws) + 0.5) / draws  # a regular grid leaves no room for luck
    drawn = _inverse_cdf(probs.expand(draws, -1), uniforms)
    assert torch.bincount(drawn, minlength=9).tolist() == [int(p * draws) for p in probs]


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(2**-20, 1.0, width=32)), min_size=1, max_size=20).filter(any),
    st.one_of(st.just(0.0), st.just(float(np.nextafter(np.float64(1), 0))), st.floats(0, 1, exclude_max=True)),
)
def test_a_token_of_probability_zero_is_never_drawn(weights: list[float], uniform: float) -> None:
    probs = torch.tensor([weights])
    assert probs[0, int(_inverse_cdf(probs, torch.tensor([uniform], dtype=torch.float32)))] > 0


def test_first_tokens_follow_the_model(llama: World) -> None:
    from scipy.stats import chisquare

    draws = 4000
    completions = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=1, batch_size=draws)).generate([llama.prompts[0]], draws, seed=1)
    )
    with torch.no_grad():
        probs = llama.plain()(torch.tensor([llama.prompts[0]])).logits[0, -1].softmax(-1).double().numpy()
    counts = np.bincount([completion.token_ids[0] for completion in completions], minlength=len(probs))
    often = probs * draws >= 5
    observed = [*counts[often], counts[~often].sum()]
    expected = [*(probs[often] * draws), probs[~often].sum() * draws]
    assert often.sum() > 20
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        (SamplingConfig(1.0, top_k=2), {3, 1}),
        (SamplingConfig(1.0, top_p=0.49), {3}),  # 0.49 is reached by the first
        (SamplingConfig(1.0, top_p=0.51), {3, 1}),
        (SamplingConfig(1.0, top_p=0.81), {3, 1, 4}),
        (SamplingConfig(1.0, top_p=0.6, top_k=4), {3, 1}),
        (SamplingConfig(1.0), {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_and_top_p(config: SamplingConfig, allowed: set[int], llama: World) -> None:
    probs = torch.tensor([[0.06, 0.30, 0.02, 0.50, 0.12]])
    kept = llama.sampler(config)._truncate(probs.log())[0]
    assert set(kept.nonzero()[:, 0].tolist()) == allowed
    ratio = kept[kept > 0] / probs[0][kept > 0]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio))  # what stays keeps its proportions


def test_top_k_of_one_is_greedy(llama: World) -> None:
    greedy = helpers.flat(llama.sampler(SamplingConfig(0.0, max_tokens=10)).generate(llama.prompts, 1, seed=0))
    narrow = helpers.flat(llama.sampler(SamplingConfig(1.0, top_k=1, max_tokens=10)).generate(llama.prompts, 1, seed=0))
    assert [c.token_ids for c in greedy] == [c.token_ids for c in narrow]


def test_stop_tokens_end_a_sample_and_stay_in_it(llama: World) -> None:
    free = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=12), stop_ids=()).generate(llama.prompts, 4, seed=4)
    )
    assert {completion.finish_reason for completion in free} == {"length"}
    stop = free[0].token_ids[5], free[7].token_ids[3]
    ended = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=12), stop_ids=stop).generate(llama.prompts, 4, seed=4)
    )
    for long, short in zip(free, ended, strict=True):
        cut = next((i + 1 for i, token in enumerate(long.token_ids) if token in stop), None)
        assert short.token_ids == long.token_ids[:cut]
        assert short.finish_reason == ("length" if cut is None else "stop")
        text_ids = long.token_ids if cut is None else long.token_ids[: cut - 1]
        assert short.text == llama.tokenizer.decode(text_ids)
    assert len({len(completion.token_ids) for completion in ended}) > 2


def test_a_stop_token_in_the_last_place_counts_as_a_stop(llama: World) -> None:
    (free,) = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=6), stop_ids=()).generate(llama.prompts[:1], 1, seed=4)
    )
    (ended,) = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=6), stop_ids=(free.token_ids[-1],)).generate(
            llama.prompts[:1], 1, seed=4
        )
    )
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids, "stop")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_scaffold_always_parses(kind: str, temperature: float, request: pytest.FixtureRequest) -> None:
    world: World = request.getfixturevalue(kind)
    scaffold = Scaffold.rewrite_form(6, 5)
    sampler = world.sampler(SamplingConfig(temperature, max_tokens=64, batch_size=256), scaffold)
    completions = helpers.flat(sampler.generate(world.prompts, 50, seed=2))
    assert [parse_rewrite(completion.text, completion.finish_reason).error for completion in completions] == [
        None
    ] * 200
    literal_tokens = sum(len(world.tokenizer.encode(text)) for text in scaffold.literals)
    lengths = [len(completion.token_ids) - literal_tokens for completion in completions]
    assert 2 <= min(lengths) <= max(lengths) <= 11
    assert world.tokenizer.decode(completions[0].token_ids) == completions[0].text


def test_scaffolded_logprobs_are_the_models_too(llama: World) -> None:
    sampler = llama.sampler(SamplingConfig(0.7, max_tokens=64), Scaffold.rewrite_form(6, 5))
    plain = llama.plain()
    for number, completion in enumerate(helpers.flat(sampler.generate(llama.prompts, 2, seed=2))):
        expected = plain_logprobs(plain, llama.prompts[number // 2], completion.token_ids, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_scaffold_that_cannot_keep_the_form_is_refused(llama: World) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Scaffold.rewrite_form(0, 5)
    with pytest.raises(ValueError, match=r"max_tokens = 20 is below the \d+ tokens"):
        llama.sampler(SamplingConfig(0.7, max_tokens=20), Scaffold.rewrite_form(6, 5))


def test_a_long_limit_costs_no_memory_before_it_is_needed(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 samples of 4096 tokens would take 12 GB in SmolLM2-135M, though most end after a hundred."""
    capacities = []
    forward = HfSampler._forward

    def spy(self: HfSampler, token_ids: torch.Tensor, positions: torch.Tensor, context: Any) -> torch.Tensor:
        if isinstance(context, DecodeContext):
            capacities.append((context.length, context.sample_keys[0].shape[2]))
        return forward(self, token_ids, positions, context)

    monkeypatch.setattr(HfSampler, "_forward", spy)
    monkeypatch.setattr(module, "FIRST_CAPACITY", 8)
    long = helpers.flat(
        llama.sampler(SamplingConfig(1.0, max_tokens=4096), stop_ids=llama.stop_ids + tuple(range(2, 20))).generate(
            llama.prompts, 2, 6
        )
    )
    assert max(len(completion.token_ids) for completion in long) > 16
    assert all(length < capacity <= max(8, 2 * length) for length, capacity in capacities)
    plain = llama.plain()
    for number, completion in enumerate(long):
        expected = plain_logprobs(plain, llama.prompts[number // 2], completion.token_ids, 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**wrong)  # type: ignore[arg-type]


def test_load_weights_takes_over_a_policy(llama: World) -> None:
    other = load_model(str(llama.folder))
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    theirs = helpers.flat(
        HfSampler(other, llama.tokenizer, SamplingConfig(1.0, max_tokens=6), ()).generate(llama.prompts, 1, seed=1)
    )
    sampler = HfSampler(load_model(str(llama.folder)), llama.tokenizer, SamplingConfig(1.0, max_tokens=6), ())
    before = helpers.flat(sampler.generate(llama.prompts, 1, seed=1))
    sampler.load_weights(Tensors(other.state_dict()), version=7)
    after = helpers.flat(sampler.generate(llama.prompts, 1, seed=1))
    assert [c.logprobs for c in after] == [c.logprobs for c in theirs] != [c.logprobs for c in before]
    assert {c.weights_version for c in before} == {0}
    assert {c.weights_version for c in after} == {7}
    assert sampler.model.training is False


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(tiny_llama: Path) -> None:
    from convsearch.types import Turn

    turns = tuple(Turn(f"number {i} where is rome?", "far " * 20) for i in range(40))
    rewriter = Rewriter(str(tiny_llama), SamplingConfig(max_tokens=400), style="compact", device="cpu")
    ids = rewriter.prompt_ids(Conversation("c", turns, "its food?", ()))
    text = rewriter.tokenizer.decode(ids)
    assert len(ids) <= 1024 - 400
    assert "number 39" in text
    assert "number 0 " not in text
    with pytest.raises(ValueError, match=r"c: the question alone has \d+ tokens"):
        rewriter.prompt_ids(Conversation("c", (), "food " * 700, ()))
    with pytest.raises(ValueError, match=r"max_tokens 4096 .* 1024"):
        Rewriter(str(tiny_llama), SamplingConfig(max_tokens=4096), style="compact", device="cpu")
