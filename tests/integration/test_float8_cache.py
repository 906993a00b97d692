# SPDX-License-Identifier: Apache-2.0
"""A cache in float8: stock vLLM's text where a budget covers the prompt, the oracle's sets else.

A number that float noise carries over an edge of float8 becomes another one, so a model of its own
would drift away from the engine's. The oracle looks at the engine's queries, keys and values.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from engine import (
    Answer,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    engine,
    free_blocks,
    generate,
    greedy,
    model_runner,
    random_prompt,
)
from expectations import contents, oracle_config
from head_pages import HeldPages, assert_kept, held_pages
from oracle import Prompt, select
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_kvcompress.adapter.cpu import CompressedCPUImpl
from vllm_kvcompress.adapter.metadata import CompressedMetadata

TYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LENGTHS = (400, 70, 257, 129)
CHUNK = 100

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's float8 kernels want AVX-512"
)


@contextmanager
def float8_engine(model: str, method: Method | None, cache: str, **settings) -> Iterator:
    """Every layer has scales of its own, as checkpoints with calibrated caches do."""
    defaults = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": False}
    with engine(model, method, kv_cache_dtype=cache, **(defaults | settings)) as llm:
        layers = model_runner(llm).compilation_config.static_forward_context.values()
        for index, layer in enumerate(layers):
            layer._k_scale_float, layer._v_scale_float = 0.03 + 0.02 * index, 0.02 + 0.01 * index
        yield llm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", TYPES)
def test_budget_covers_prompt(checkpoint, cache, dtype):
    """Both model types: their kernels keep pages in unlike order."""
    model = checkpoint("llama")
    prompts = [random_prompt(length, seed=1) for length in LENGTHS]
    params = [greedy(3 + 5 * index) for index in range(len(prompts))]
    with float8_engine(model, None, cache, dtype=dtype) as llm:
        expected = generate(llm, prompts, params)
    with float8_engine(model, Method("bacon+adakv", 4096), cache, dtype=dtype) as llm:
        assert_same(generate(llm, prompts, params), expected)
    with engine(model, None, max_num_batched_tokens=CHUNK, dtype=dtype) as llm:
        assert generate(llm, prompts, params) != expected, "the cache was not in float8"


@contextmanager
def rounded_queries(typed: bool) -> Iterator[None]:
    """Queries rounded to e4m3 with a scale, in that type as FlashAttention gets them, or not.

    vLLM's CPU kernel takes no such type: it gets the numbers, which are the same in both cases.
    """
    ours, stock, scale = CompressedCPUImpl.forward, CPUAttentionBackendImpl.forward, 0.3

    def forward(impl, layer, query, key, value, cache, metadata, output, *args, **kwargs):
        if isinstance(metadata, CompressedMetadata):
            layer._q_scale_float = scale
            rounded = (query / scale).to(torch.float8_e4m3fn)
            query = rounded if typed else rounded.to(query.dtype) * scale
        return ours(impl, layer, query, key, value, cache, metadata, output, *args, **kwargs)

    def attend(impl, layer, query, key, value, cache, metadata, output, *args, **kwargs):
        if query.dtype == torch.float8_e4m3fn:
            query = query.to(output.dtype) * scale
        return stock(impl, layer, query, key, value, cache, metadata, output, *args, **kwargs)

    with (
        patch.object(CompressedCPUImpl, "forward", forward),
        patch.object(CPUAttentionBackendImpl, "forward", attend),
    ):
        yield


@pytest.mark.parametrize("method", ["bacon+adakv", "h2o"])
def test_queries_in_float8(checkpoint, method):
    """Rows of earlier chunks, prompts beside decodes, sums over all rows."""
    prompts = [random_prompt(length, seed=3) for length in LENGTHS]
    params = [greedy(3 + 5 * index) for index in range(len(prompts))]
    answers = []
    for typed in (False, True):
        with (
            float8_engine(checkpoint("llama"), Method(method, 96), "fp8", max_num_seqs=3) as llm,
            rounded_queries(typed),
        ):
            answers.append(generate(llm, prompts, params))
    assert_same(answers[1], answers[0])


class Recorder:
    """Queries, keys and values of the prompt that an engine computes."""

    def __init__(self, monkeypatch) -> None:
        self.rows: dict[str, list[list[torch.Tensor]]] = {}
        self.scales: dict[str, tuple[float, float]] = {}
        update, forward = CompressedCPUImpl.do_kv_cache_update, CompressedCPUImpl.forward

        def note(layer, *rows: torch.Tensor) -> None:
            for kind, row in zip(self.rows[layer.layer_name], rows, strict=True):
                kind.append(row.float().clone())

        def do_kv_cache_update(impl, layer, key, value, cache, slots):
            self.rows.setdefault(layer.layer_name, [[], [], []])
            self.scales[layer.layer_name] = layer._k_scale_float, layer._v_scale_float
            self._latest = key[: len(slots)], value[: len(slots)]
            update(impl, layer, key, value, cache, slots)

        def attend(impl, layer, query, key, value, cache, metadata, *args, **kwargs):
            if isinstance(metadata, CompressedMetadata):
                note(layer, query[: metadata.num_actual_tokens], *self._latest)
            return forward(impl, layer, query, key, value, cache, metadata, *args, **kwargs)

        monkeypatch.setattr(CompressedCPUImpl, "do_kv_cache_update", do_kv_cache_update)
        monkeypatch.setattr(CompressedCPUImpl, "forward", attend)

    def prompt(self, length: int, float8: torch.dtype) -> Prompt:
        """What the oracle is to see: the keys and values that stand in the cache."""
        parts = defaultdict(list)
        for name, (queries, keys, values) in self.rows.items():
            key_scale, value_scale = self.scales[name]
            parts["q"].append(torch.cat(queries)[:length])
            parts["k"].append(cut_off(torch.cat(keys)[:length], key_scale, float8))
            parts["v"].append(cut_off(torch.cat(values)[:length], value_scale, float8))
        arrays = {kind: torch.stack(rows).transpose(1, 2).numpy() for kind, rows in parts.items()}
        return Prompt(**arrays, scale=arrays["q"].shape[3] ** -0.5)


def cut_off(rows: torch.Tensor, scale: float, float8: torch.dtype) -> torch.Tensor:
    """Numbers as vLLM's CPU kernel leaves them in the cache: rounded towards zero."""
    size = (rows / scale).abs()
    nearest = size.to(float8)
    bits = nearest.view(torch.uint8) - (nearest.float() > size).to(torch.uint8)
    return torch.copysign(bits.view(float8).float(), rows) * scale


CASES = {
    "window": ("bacon+adakv", {"alpha": 0.0, "mode": "rel"}, "fp8"),
    "column-sums": ("h2o", {}, "fp8_e5m2"),
    "values": ("mixkv", {}, "fp8"),
    "static-pages-of-all-layers": ("snapkv+pyramid", {}, "fp8_e5m2"),
    "late-pages-of-all-layers": ("h2o+vlcache", {}, "fp8"),
    "merged": ("snapkv+uniform+lookm", {}, "fp8"),
    "late-and-merged": ("h2o+prefixkv+lookm", {}, "fp8"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_real_budget(checkpoint, monkeypatch, case):
    name, options, cache = case
    method, length = Method(name, 96, 32, tuple(options.items())), 389
    cfg = oracle_config(method.additional_config["kv_compression"])
    recorder = Recorder(monkeypatch)
    with float8_engine(checkpoint("llama"), method, cache) as llm:
        recorder.rows.clear()
        held, answer = run(llm, random_prompt(length, seed=2))
    prompt = recorder.prompt(length, TYPES[cache])
    selection = select(prompt, cfg)
    assert selection.plan.compressed
    assert len(answer.token_ids) == 8
    keys, values = contents(prompt, selection, cfg)
    if cfg.merge == "none":
        assert_kept(held, prompt.k, selection.kept)
    assert_stored(held, keys, values, recorder, exactly=cfg.merge == "none")


def run(llm, prompt: list[int]) -> tuple[HeldPages, Answer]:
    """One request alone; what it holds once it has been compressed."""
    free, held = free_blocks(llm), None
    stepper = Stepper(llm)
    stepper.add("it", prompt)
    while stepper.engine.has_unfinished_requests():
        stepper.step()
        if held is None and stepper.num_computed("it") > len(prompt):
            held = held_pages(stepper, "it")
    stepper.run()
    assert_clean(llm, free)
    return held, stepper.done["it"]


def assert_stored(
    held: HeldPages, keys: list, values: list, recorder: Recorder, *, exactly: bool
) -> None:
    """Copies are exact; what a merge has made is rounded to the nearest number of e4m3."""
    for part, (found, expected) in enumerate(((held.keys, keys), (held.values, values))):
        for layer, heads in enumerate(expected):
            scale = list(recorder.scales.values())[layer][part]
            step = np.float64(2**-10 * scale)
            for head, rows in enumerate(heads):
                error = np.abs(found[layer][head][: len(rows)] - rows)
                limit = 0.0 if exactly else np.maximum(np.abs(rows) / 16, step) * 1.001
                assert (error <= limit).all(), (part, layer, head, error.max())
