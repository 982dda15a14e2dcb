"""What several test files of the trainers share, made once a session in a temporary folder."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a change and not a throw of the dice turns a test red. To look for new ones:
# HYPOTHESIS_PROFILE=explore pytest. No deadlines: a machine with other work misses them.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


# Slow tests that measure times or memory, or start several processes at once: they run when nothing else does.
ALONE = (
    *("test_benchmark_grpo_step", "test_cluster_ray", "test_eval_scale", "test_grpo_faults", "test_help"),
    *("test_inspector", "test_network_faults", "test_pipeline", "test_playground", "test_report"),
    *("test_retriever_load", "test_retriever_process", "test_stopping", "test_vllm"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Java and vLLM take seconds to start: whatever needs them belongs to the slow tier."""
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)
        if item.get_closest_marker("lucene") or item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers (4 query heads on 2 key heads, tied embeddings) with its tokenizer."""
    import helpers_trainers as helpers

    folder = tmp_path_factory.mktemp("tiny_llama")
    helpers.build_tokenizer(folder, helpers.training_texts())
    helpers.build_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the Qwen2 type: biases in the attention, untied embeddings."""
    import helpers_trainers as helpers

    folder = tmp_path_factory.mktemp("tiny_qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_llama / name).is_file():
            shutil.copy(tiny_llama / name, folder / name)
    helpers.build_model(folder, "qwen2")
    return folder


@pytest.fixture(scope="session")
def form_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that keeps the form in most samples but names any town and any aspect."""
    import helpers_trainers as helpers

    source, folder = tmp_path_factory.mktemp("narrow_llama"), tmp_path_factory.mktemp("form_llama")
    shutil.copytree(tiny_llama, source, dirs_exist_ok=True)
    helpers.build_model(source, spread=0.02)
    helpers.teach_form(source, folder)
    return folder


@pytest.fixture(scope="session")
def toy_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BM25 index of the eighteen passages."""
    import helpers_trainers as helpers

    return helpers.build_index(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_server(toy_index: Path) -> Iterator[str]:
    """The address of a real server of that index."""
    from convsearch.retriever.embedded import open_retriever

    with open_retriever(f"embedded:{toy_index}") as retriever:
        retriever.health()
        yield retriever.url


@pytest.fixture(scope="session")
def toy_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GRPO rows, one a passage."""
    import helpers_trainers as helpers

    return helpers.write_parquet(
        tmp_path_factory.mktemp("parquet") / "train.parquet", helpers.grpo_rows(list(helpers.GOLDS))
    )
