"""gensim's BM25, sentence-transformers' vectors and cosines, each by the plainest use of the library.

``python helpers_rqr_oracles.py KIND IN.json OUT.npy``.

A process of its own, because the libraries live in a folder that only its path names (tests/requirements-oracles.txt).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ORACLES = Path(os.environ.get("CONVSEARCH_ORACLES", Path(sys.prefix) / "oracles"))


def ask(kind: str, given: dict[str, Any], folder: Path) -> np.ndarray:
    """What the library of ``kind`` answers; the test skips where it is not installed."""
    if not (ORACLES / kind).is_dir():
        pytest.skip(
            f"{kind} is not installed: pip install --no-deps --target {ORACLES} -r tests/requirements-oracles.txt"
        )
    (folder / "in.json").write_text(json.dumps(given))
    environment = {**os.environ, "PYTHONPATH": str(ORACLES), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, kind, str(folder / "in.json"), str(folder / "out.npy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "out.npy")


def gensim(given: dict[str, Any]) -> np.ndarray:
    """LuceneBM25Model on both sides of a product, as in BRIGHT's own script: [queries, documents]."""
    from gensim.corpora import Dictionary
    from gensim.models import LuceneBM25Model
    from gensim.similarities import SparseMatrixSimilarity

    dictionary = Dictionary(given["documents"])
    model = LuceneBM25Model(dictionary=dictionary, k1=0.9, b=0.4)
    bags = model[list(map(dictionary.doc2bow, given["documents"]))]
    index = SparseMatrixSimilarity(
        bags,
        num_docs=len(given["documents"]),
        num_terms=len(dictionary),
        normalize_queries=False,
        normalize_documents=False,
    )
    return np.stack([index[model[dictionary.doc2bow(query)]] for query in given["queries"]])


def sentence_transformers(given: dict[str, Any]) -> np.ndarray:
    """The vectors of ``texts``; or RQR's reward of (output, question, positives), one by one: 10 x mean over d of
    [cos(output, d) - cos(question, d)]."""
    from sentence_transformers import SentenceTransformer

    model, rewards = SentenceTransformer(given["model"], device="cpu"), []
    if "texts" in given:
        return np.asarray(model.encode(given["texts"]))
    for text, asked, positives in given["items"]:
        output, question = (model.encode([one], normalize_embeddings=True) for one in (text, asked))
        near = model.encode(positives, normalize_embeddings=True)
        rewards.append(10 * float(np.mean(output @ near.T - question @ near.T)))
    return np.array(rewards)


if __name__ == "__main__":
    answer = {"gensim": gensim, "sentence_transformers": sentence_transformers}[sys.argv[1]](
        json.loads(Path(sys.argv[2]).read_text())
    )
    np.save(sys.argv[3], answer)
