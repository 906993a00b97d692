# SPDX-License-Identifier: Apache-2.0
"""What a call of the pipeline takes, and that its split changes nothing."""

import json

import pytest
import torch
from live_bytes import LiveBytes
from paged_cache import LAYERS, Cache, compress
from planners import planner_of

from vllm_kvcompress.pipeline import CompressionPipeline
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import SCORERS
from vllm_kvcompress.scoring.proxies import standard_normal
from vllm_kvcompress.testing.inputs import Maker
from vllm_kvcompress.workspace import Workspace

PROMPTS = [
    PromptFacts(600, ((10, 200), (210, 460)), widths=(19, 25)),
    PromptFacts(500, ((50, 360),), widths=(31,)),
]
METHODS = [
    *(f"{scorer}+uniform" for scorer in SCORERS),
    *(f"snapkv+{name}" for name in ("adakv", "pyramid", "prefixkv", "vlcache", "aircache")),
    *("snapkv+adakv+lookm", "elastic+uniform+elastic", "das+uniform+recycle"),
]


class TestWorkspace:
    SPACE = Workspace(scoring=30, selecting=10, held=20, staged=80)

    def test_scores_are_gone_when_tokens_are_copied(self):
        assert self.SPACE.bytes(num_layers=4, num_prompts=3) == 3 * (20 + max(4 * 30, 80 + 4 * 10))
        assert self.SPACE.bytes(num_layers=2, num_prompts=3) == 3 * (20 + max(2 * 30, 80 + 2 * 10))

    @pytest.mark.parametrize(
        ("limit", "split"),
        [(10**6, (4, 3)), (420, (4, 3)), (419, (4, 2)), (140, (4, 1)), (139, (3, 1)), (0, (1, 1))],
    )
    def test_prompts_are_split_before_layers(self, limit, split):
        assert self.SPACE.split(limit, num_layers=4, num_prompts=3) == split


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_holds(monkeypatch, method):
    """An upper bound, and not a wild one."""
    planner = planner_of(16, method=method, budget="40%", window=16)
    original, seen = CompressionPipeline.compress, {}

    def watched(pipeline, prompts, stack):
        seen["bound"] = pipeline.workspace(prompts, stack).bytes(LAYERS, len(PROMPTS))
        with LiveBytes(monkeypatch, [(Maker, "project"), (Maker, "rotate")]) as live:
            count = original(pipeline, prompts, stack)
        seen["peak"] = live.peak
        return count

    standard_normal.cache_clear()
    monkeypatch.setattr(CompressionPipeline, "compress", watched)
    compress(Cache.random(PROMPTS, 16, seed=1), planner)
    assert seen["peak"] <= seen["bound"] <= 6 * seen["peak"]


@pytest.mark.parametrize(
    "method",
    [
        *(
            "bacon+uniform",
            "bacon+adakv",
            "bacon-plus+adakv",
            "bacon+sparsemm",
            "shiftkv+pyramid",
            "expected+vlcache",
        ),
        *("h2o+prefixkv", "das+aircache+recycle", "mixkv+adakv+lookm", "postvision+uniform"),
    ],
)
@pytest.mark.parametrize("layers", [1, 2])
def test_results_do_not_depend_on_the_split(monkeypatch, tmp_path, method, layers):
    """One prompt after another, and layers in groups: the same pages, byte by byte."""
    options = {}
    if "sparsemm" in method:
        path = tmp_path / "heads.json"
        heads = [(layer, head) for layer in range(LAYERS) for head in range(4)]
        path.write_text(json.dumps({f"{a}-{b}": [a + b + 1] for a, b in heads}))
        options["head_scores"] = str(path)
    planner = planner_of(16, method=method, budget=60, window=8, **options)
    caches = [Cache.random([*PROMPTS, PromptFacts(90)], 16, seed=1) for _ in range(2)]
    states = [compress(caches[0], planner)[0]]
    monkeypatch.setattr(Workspace, "split", lambda *_: (layers, 1))
    states.append(compress(caches[1], planner)[0])
    whole, split = (cache.all_pages.view(LAYERS, -1) for cache in caches)
    first = 2 * caches[0].all_pages.shape[1]  # the null block takes what nobody reads
    assert whole[:, first:].equal(split[:, first:])
    for name, value in vars(states[0]).items():
        other = getattr(states[1], name)
        assert value.equal(other) if isinstance(value, torch.Tensor) else value == other
