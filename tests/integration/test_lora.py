# SPDX-License-Identifier: Apache-2.0
"""Requests with adapters: what a method projects goes through each request's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import (
    Answer,
    Method,
    Stepper,
    assert_clean,
    compressed_layers,
    engine,
    free_blocks,
    greedy,
    random_prompt,
)
from head_pages import held_pages
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from vllm_kvcompress.adapter import lora
from vllm_kvcompress.config import KVCompressionError

RANK = 8
PROJECTIONS = {"q_proj": (256, 256), "k_proj": (256, 64), "v_proj": (256, 64), "o_proj": (256, 256)}
"""Inputs and outputs of the tiny llama's; all of them have adapters."""
PROMPT = random_prompt(300, seed=81)
"""The same for everybody: only adapters can make kept sets differ."""
SETTINGS = {
    "enable_lora": True,
    "max_loras": 3,  # vLLM's CPU kernels take the last one for requests without adapter
    "max_lora_rank": RANK,
    "enable_prefix_caching": False,
}
METHODS = [
    Method("shiftkv", 96),
    Method("das", 96, options=(("base", "shiftkv"),)),
    Method("expected", 96),
]
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[LoRARequest | None]:
    """Two adapters, and None for the model itself."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = [write_adapter(folder / name, seed) for seed, name in enumerate(("first", "second"))]
    return [*(LoRARequest(path.name, 1 + i, str(path)) for i, path in enumerate(paths)), None]


def write_adapter(folder: Path, seed: int) -> Path:
    """Random weights in PEFT's format, large enough to change what is kept."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    config |= {"target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(2):
        for name, (inputs, outputs) in PROJECTIONS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            for part, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                noise = torch.randn(shape, generator=generator)
                weights[f"{prefix}{part}.weight"] = 0.15 * noise
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


class Kept:
    """A finished request, and the keys it kept of its prompt."""

    def __init__(self, keys: list[np.ndarray], answer: Answer) -> None:
        self.keys, self.answer = keys, answer


def serve(llm, requests: list[LoRARequest | None]) -> list[Kept]:
    """One prompt with each adapter, as one batch."""
    stepper = Stepper(llm)
    for index, adapter in enumerate(requests):
        stepper.internal[str(index)] = stepper.engine.add_request(
            str(index), {"prompt_token_ids": PROMPT}, greedy(8), lora_request=adapter
        )
        stepper.prompts[str(index)] = PROMPT
    kept: dict[str, list[np.ndarray]] = {}
    while stepper.engine.has_unfinished_requests():
        stepper.step()
        for name in stepper.prompts:
            if stepper.num_computed(name) > len(PROMPT) and name not in kept:
                held = held_pages(stepper, name)
                behind = held.num_computed - len(PROMPT)
                kept[name] = [h[: len(h) - behind] for layer in held.keys for h in layer]
    stepper.run()
    return [Kept(kept[str(i)], stepper.done[str(i)]) for i in range(len(requests))]


def same(one: Kept, other: Kept) -> bool:
    """Whether the same tokens were kept: no two keys of a prompt are alike."""
    return all(
        a.shape == b.shape and np.allclose(a, b, atol=1e-4)
        for a, b in zip(one.keys, other.keys, strict=True)
    )


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    return checkpoint("llama", layers=2)


@by_method
def test_adapters_in_one_batch(model, adapters, method):
    """Each request keeps what it keeps alone; the adapters make a difference."""
    with engine(model, method, **SETTINGS) as llm:
        free = free_blocks(llm)
        together = serve(llm, adapters)
        alone = [serve(llm, [adapter])[0] for adapter in adapters]
        assert_clean(llm, free)
    for one, other in zip(together, alone, strict=True):
        assert same(one, other)
        assert one.answer.token_ids == other.answer.token_ids
    assert not same(together[0], together[1])
    assert not same(together[0], together[2])


def test_proxies_of_the_model_itself_would_keep_others(model, adapters, monkeypatch):
    with engine(model, METHODS[0], **SETTINGS) as llm:
        (expected,) = serve(llm, adapters[:1])
        original = lora.project

        def project(layer, rows, width, slots):
            return original(layer, rows, width, torch.full_like(slots, lora.NO_ADAPTER))

        monkeypatch.setattr(lora, "project", project)
        (served,) = serve(llm, adapters[:1])
    assert not same(served, expected)


def test_projection_is_that_of_the_layer(model, adapters):
    """Rows of several requests, in one call, against each adapter's own weights."""
    with engine(model, METHODS[0], **SETTINGS) as llm:
        serve(llm, adapters)
        layer = next(
            m.qkv_proj
            for m in llm.llm_engine.model_executor.driver_worker.worker.get_model().modules()
            if hasattr(m, "qkv_proj")
        )
        rows = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
        found = lora.project(layer, rows, 256, torch.tensor([1, -1, 0]))
        plain = layer.base_layer.forward(rows)[0][..., :256]
        assert torch.equal(found[1], plain[1])
        for index, slot in ((0, 1), (2, 0)):
            down, up = layer.lora_a_stacked[0][slot, 0], layer.lora_b_stacked[0][slot, 0]
            added = rows[index] @ down.T @ up.T
            assert added.abs().max() > 1
            torch.testing.assert_close(found[index], plain[index] + added, rtol=1e-4, atol=1e-4)


def test_adapters_that_others_have_pushed_out(model, adapters, monkeypatch):
    """With room for one adapter, the others are brought back when their prompts are compressed."""
    with engine(model, METHODS[0], **SETTINGS) as llm:
        expected = [serve(llm, [adapter])[0] for adapter in adapters]
    with engine(model, METHODS[0], **(SETTINGS | {"max_loras": 1})) as llm:
        layers = compressed_layers(llm)
        slots = layers.adapters.slots

        def forgetful(req_ids):
            manager = layers.adapters._runner.lora_manager._adapter_manager
            for held in filter(None, list(manager.lora_index_to_id)):
                manager.deactivate_adapter(held)
            return slots(req_ids)

        monkeypatch.setattr(layers.adapters, "slots", forgetful)
        found = [serve(llm, [adapter])[0] for adapter in adapters]
    assert all(map(same, found, expected))


def test_more_adapters_than_room(model, adapters, monkeypatch):
    """Prompts go one after another where all of their adapters would not fit at a time."""
    with engine(model, METHODS[0], **SETTINGS) as llm:
        expected = serve(llm, adapters)
        layers, batches = compressed_layers(llm), []
        compress = layers._compress

        def spy(operation, orders):
            batches.append(len(orders))
            compress(operation, orders)

        monkeypatch.setattr(layers, "_compress", spy)
        monkeypatch.setattr(layers.adapters, "most", 1)
        found = serve(llm, adapters)
    assert batches == [1, 1, 1]
    assert all(map(same, found, expected))


def test_sharded_adapters_are_refused(model, monkeypatch):
    monkeypatch.setattr(lora, "conflicts", lambda *_: ["ranks hold parts"])
    with (
        pytest.raises(KVCompressionError, match="shiftkv projects rows of its own; ranks hold"),
        engine(model, METHODS[0], **SETTINGS),
    ):
        pass
