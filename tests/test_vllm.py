"""What the vLLM sampler promises, on vLLM's CPU build.

1. Its log-probs are the policy's, before and after the weights are replaced, with tied and with untied output layers.
2. A sample depends on (seed, prompt, number) alone; every sample carries the version of its weights.
3. Samples end with a stop token that is part of them, or at their length.
"""

from pathlib import Path

import helpers_cluster
import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(helpers_cluster.why_absent() is not None, reason=str(helpers_cluster.why_absent())),
]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_samples_of_vllm(kind: str, tmp_path: Path) -> None:
    report = helpers_cluster.call("vllm_report", helpers_cluster.vllm_model(tmp_path / kind, kind))
    assert report["before"] < 1e-3
    assert max(report["after"]) < 1e-3
    assert min(report["stale"]) > 0.05  # the update is one that would be seen
    assert report["versions"] == [2]
    assert report["again"]
    assert report["alone"] == [True] * 3
    assert not report["other_seed"]
    assert report["different"] > 9
    assert report["texts"]
    assert report["left"]
    assert {reason for reason, *_ in report["ends"]} == {"stop", "length"}
    for reason, length, ends_with_stop, stops_inside in report["ends"]:
        assert ends_with_stop == (reason == "stop")
        assert not stops_inside
        assert length == 24 if reason == "length" else length <= 24
