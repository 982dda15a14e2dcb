"""Sampling with vLLM in this process, CPU and GPU builds alike: token ids in, token ids with their log-probs out.

Ours are the chat template (prompts arrive as ids), the seeds (one per sample, from (seed, prompt, sample), so that a
sample does not depend on which sampler draws it) and the stop tokens. vLLM does batching, shares the prefix of a
prompt's n samples, and transfers weights on GPUs.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from convsearch.sampling.base import Finished, Prompt, SamplingConfig, WeightSource, check_finite, collect
from convsearch.types import Completion

CPU_CACHE_BYTES = 1 << 31  # limit of the memory for keys and values on a CPU; sequences that do not fit wait
INSTALL = (
    "vLLM is not installed: pip install -e .[gpu] on a GPU machine; "
    "on a CPU the packages of tests/requirements-vllm.txt, see docs/cluster.md"
)


class VllmSampler:
    """Implements ``convsearch.sampling.base.Sampler``.

    Args:
        path: model folder or hub name that the engine starts with; ``load_weights`` replaces its weights.
        stop_ids: tokens that end a sample and stay in it.
        model_len: tokens of the longest prompt and response together.
        stop: strings that end a sample and stay in it.
        transfer: how weights reach the engine on GPUs (``cluster.weight_transfer``); None: by ``load_weights``.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        config: SamplingConfig,
        stop_ids: tuple[int, ...],
        *,
        model_len: int,
        device: Literal["cpu", "cuda"],
        bf16: bool = False,
        stop: tuple[str, ...] = (),
        tensor_parallel: int = 1,
        memory_share: float = 0.6,
        transfer: Literal["ipc", "nccl"] | None = None,
        trust_remote_code: bool = False,
    ):
        # This process has nothing but the engine: a second process for its core would only copy the samples.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if device == "cpu":
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # it shares its cores with the policy's ranks
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(f"{INSTALL} ({error})") from error
        options: dict[str, Any] = {
            "model": path,
            "dtype": "bfloat16" if bf16 else "float32",
            "max_model_len": model_len,
            "max_num_seqs": config.batch_size,
            "tensor_parallel_size": tensor_parallel,
            "skip_tokenizer_init": not stop,
            "trust_remote_code": trust_remote_code,
            "logprobs_mode": "processed_logprobs",  # of the sampled distribution, not of temperature 1
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
        options |= _cpu_options(path, config, model_len) if device == "cpu" else _gpu_options(memory_share, transfer)
        self.llm: Any = LLM(**options)
        self.tokenizer, self.config, self.device = tokenizer, config, device
        self.stop_ids, self.stop = frozenset(stop_ids), stop
        self.version, self._requests = 0, 0
        self._asleep: set[str] = set()  # what the engine has moved out of GPU memory

    def generate(
        self, prompts: Sequence[Prompt], n: int, seed: int, keys: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """n samples of every prompt; ``keys`` as for HfSampler."""
        return collect(self.stream(prompts, n, seed, keys), len(prompts))

    def stream(
        self, prompts: Sequence[Prompt], n: int, seed: int, keys: Sequence[int] | None = None
    ) -> Iterator[Finished]:
        """The samples of a prompt as soon as all n are finished, in the order in which they finish."""
        self.wake_up()
        engine = self.llm.llm_engine
        places: dict[str, tuple[int, int]] = {}
        for p, prompt in enumerate(prompts):
            for g in range(n):
                name = str(self._requests)
                self._requests += 1
                places[name] = (p, g)
                params = self._params(sample_seed(seed, keys[p] if keys else p, g))
                engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        groups: list[dict[int, Completion]] = [{} for _ in prompts]
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        p, g = places.pop(output.request_id)
                        groups[p][g] = self._completion(output.outputs[0])
                        if len(groups[p]) == n:
                            yield {p: [groups[p][g] for g in range(n)]}
        finally:
            if places:  # the caller has stopped reading
                engine.abort_request(list(places))

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Takes over the policy's weights by vLLM's in-place reload, and drops the keys and values of the old ones."""
        self.wake_up()
        self.llm.collective_rpc(partial(_reload, tensors=source.weights()))
        self.stamp(version)

    def stamp(self, version: int) -> None:
        """Notes that the engine now has the weights of ``version``."""
        self.llm.reset_prefix_cache()
        self.version = version

    def sleep(self) -> None:
        """Moves the weights from the GPU to CPU memory. On a CPU: nothing (vLLM's sleep hangs there)."""
        if self.device == "cuda" and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache", "scheduling"}

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Takes the memory back; ``tags=["weights"]``: only what a transfer of weights needs."""
        wanted = self._asleep if tags is None else self._asleep & set(tags)
        if wanted:
            self.llm.wake_up(sorted(wanted))
            self._asleep = self._asleep - wanted

    def _params(self, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            repetition_penalty=self.config.repetition_penalty,
            max_tokens=self.config.max_tokens,
            seed=seed,
            logprobs=0,  # the sampled token's
            stop_token_ids=sorted(self.stop_ids),
            stop=list(self.stop),
            include_stop_str_in_output=True,
            detokenize=bool(self.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any) -> Completion:
        token_ids = tuple(output.token_ids)
        logprobs = tuple(
            float(choices[token].logprob) for token, choices in zip(token_ids, output.logprobs, strict=True)
        )
        check_finite(logprobs)
        assert output.finish_reason in ("stop", "length"), output.finish_reason
        text_ids = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids
        text = self.tokenizer.decode(list(text_ids), skip_special_tokens=False)
        return Completion(token_ids, logprobs, text, output.finish_reason, self.version)


def sample_seed(seed: int, key: int, number: int) -> int:
    """A seed of 63 bits for sample ``number`` of the prompt that ``key`` identifies."""
    return int(np.random.SeedSequence([seed, key, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _gpu_options(memory_share: float, transfer: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"gpu_memory_utilization": memory_share, "enable_sleep_mode": transfer != "nccl"}
    if transfer is not None:
        from vllm.config import WeightTransferConfig

        options["weight_transfer_config"] = WeightTransferConfig(backend=transfer)
    return options


def _cpu_options(path: str, config: SamplingConfig, model_len: int) -> dict[str, Any]:
    model = AutoConfig.from_pretrained(path)
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    position = 2 * 4 * model.num_hidden_layers * model.num_key_value_heads * head  # bytes: keys and values in float32
    blocks = -(-model_len // 128) + 1
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": min(CPU_CACHE_BYTES, max(1, config.batch_size) * blocks * 128 * position),
        # A prompt that is read in chunks needs a generator's offset, which CPU generators lack (vLLM 0.32).
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(model_len, 4096),
    }


def _reload(worker: Any, tensors: Mapping[str, Tensor]) -> None:
    """Runs inside vLLM's worker. The reload leaves the CPU build's packed copy of a tied output layer stale (0.32)."""
    runner = worker.model_runner
    runner.reload_weights(weights_iterator=iter(tensors.items()))
    model = runner.get_model()
    if runner.device.type == "cpu" and model.config.tie_word_embeddings:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        model.lm_head.weight = model.model.embed_tokens.weight
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
