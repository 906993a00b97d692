# SPDX-License-Identifier: Apache-2.0
"""Slow, independent oracle: scores, kept sets and greedy output of a compressed prompt.

Selection is numpy in float64. The model is a Hugging Face checkpoint in float32 on the CPU: one
uncompressed prefill gives q and k of every layer, the kept sets follow from them, and each decode
step runs on the *full* cache with the evicted prompt positions of every KV head masked to -inf.
Nothing is ever moved, so every entry keeps its logical position, RoPE and M-RoPE included.

Symbols: L layers, Hq query heads, Hkv KV heads, D head size, P prompt tokens, W window,
n = P - W scored prefix columns, bs block size, m = P // bs full blocks, tail = P - m*bs.

    |0 ................................. m*bs| .... P|    prompt
    |        m full blocks: compacted        | tail  |    the tail is always kept
    |0 ........................ P-W| .............. P|    prefix (scored) | window (pinned)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EPS = 1e-8
TOP_LOGPROBS = 5

KeptSets = list[list[np.ndarray]]  # [L][Hkv] ascending prompt positions, int64


@dataclass(frozen=True)
class OracleConfig:
    """One compression setting; `budget` is in tokens per KV head and includes the window."""

    budget: int
    scorer: str = "snapkv"  # snapkv | bacon
    allocator: str = "uniform"  # uniform | adakv
    window: int = 32
    kernel: int = 5
    pool: str = "avg"  # avg | max
    reduction: str = "mean"  # mean | max, over the query heads of a group
    mode: str = "elt"  # bacon: e | el | elt | rel
    local_k: int = 5
    trace_r: int = 4
    lambda_c: float = 0.5
    topk_frac: float = 2.0
    alpha: float = 0.2  # adakv floor
    normalize: bool = True  # adakv
    rounding: str = "exact"  # adakv: exact | official
    block_size: int = 32

    def __post_init__(self) -> None:
        choices = {
            "scorer": ("snapkv", "bacon"),
            "allocator": ("uniform", "adakv"),
            "pool": ("avg", "max"),
            "reduction": ("mean", "max"),
            "mode": ("e", "el", "elt", "rel"),
            "rounding": ("exact", "official"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        for name in ("kernel", "local_k"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise ValueError(f"{name}: expected an odd number >= 1, got {getattr(self, name)}")
        if not 0 < self.window < self.budget:
            raise ValueError(f"expected 0 < window < budget, got {self.window} and {self.budget}")

    @property
    def scored_budget(self) -> int:
        """Tokens per KV head left for the prefix: b in adakv, C_l in bacon."""
        return self.budget - self.window


class PagePlan(NamedTuple):
    """How a prompt of P tokens splits into pages; `uniform` is n_pages of a uniform head."""

    full: int  # m
    tail: int
    uniform: int
    compressed: bool


class OracleOutput(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]  # of the chosen tokens
    top5: list[dict[int, float]]  # token id -> log-probability, best first
    kept: KeptSets


def attention_rows(q: np.ndarray, k: np.ndarray, window: int, scale: float) -> np.ndarray:
    """Causal attention probabilities of the last `window` queries over all keys.

    q [Hq, P, D], k [Hkv, P, D] -> [Hq, W, P] float64.
    """
    num_q, length, _ = q.shape
    group = num_q // k.shape[0]
    rows = np.arange(length - window, length)
    hidden = np.arange(length)[None, :] > rows[:, None]
    out = np.empty((num_q, window, length))
    for h in range(num_q):
        logits = q[h, rows].astype(np.float64) @ k[h // group].astype(np.float64).T * scale
        logits[hidden] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[h] = weights / weights.sum(axis=1, keepdims=True)
    return out


def pool1d(x: np.ndarray, kernel: int, kind: str) -> np.ndarray:
    """Stride-1 pooling of the last axis; avg pads zeros and counts them, max pads -inf."""
    half, length = kernel // 2, x.shape[-1]
    pad = np.full((*x.shape[:-1], half), 0.0 if kind == "avg" else -np.inf)
    padded = np.concatenate([pad, x, pad], axis=-1)
    shifted = np.stack([padded[..., u : u + length] for u in range(kernel)])
    return shifted.sum(axis=0) / kernel if kind == "avg" else shifted.max(axis=0)


def reduce_and_pool(per_query: np.ndarray, num_kv: int, cfg: OracleConfig) -> np.ndarray:
    """[Hq, n] -> [Hkv, n]: reduce each group of query heads, then pool over the prefix."""
    grouped = per_query.reshape(num_kv, -1, per_query.shape[-1])
    reduced = grouped.mean(axis=1) if cfg.reduction == "mean" else grouped.max(axis=1)
    return pool1d(reduced, cfg.kernel, cfg.pool)


def descending(x: np.ndarray) -> np.ndarray:
    """Values sorted descending along the last axis, NaN last."""
    return -np.sort(-x, axis=-1)


def boundary_calibration(
    base: np.ndarray,  # [Hkv, n] B
    last: np.ndarray,  # [Hkv, n] Q
    trace: Sequence[np.ndarray],  # earlier E, each [Hkv, n]
    capacity: int,  # C_l
    cfg: OracleConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """bacon: the calibrated score S and the evidence E to record, both [Hkv, n]."""
    evidence = np.maximum(last - base, 0.0)
    coherence = pool1d(evidence, cfg.local_k, "avg")
    if cfg.mode == "rel":
        around = pool1d(base, cfg.local_k, "avg")
        coherence = coherence * around / (around + base + EPS)
    persistence = np.zeros_like(base)
    if len(trace) > 0:
        persistence = np.mean(trace, axis=0)
        if cfg.mode == "rel":
            persistence = np.maximum(persistence - np.std(trace, axis=0), 0.0)

    value = evidence
    if cfg.mode != "e":
        value = value + coherence
    if cfg.mode in ("elt", "rel"):
        value = value + persistence

    count = max(1, min(int(cfg.topk_frac * capacity), base.shape[-1]))
    base_top = descending(base)[:, :count]
    value_top = descending(value)[:, :count]
    rho = np.ones(base.shape[0])
    if cfg.mode == "elt":
        rho = np.clip(value_top.mean(axis=1) / (base_top.mean(axis=1) + EPS), 0.0, 1.0)
    lam = cfg.lambda_c * rho * base_top.std(axis=1) / (value_top.std(axis=1) + EPS)
    return base + lam[:, None] * value, evidence


def scores(q: np.ndarray, k: np.ndarray, cfg: OracleConfig, scale: float) -> np.ndarray:
    """Score of every prefix column t < P - W, higher = keep.

    q [L, Hq, P, D], k [L, Hkv, P, D], both after norm and RoPE -> [L, Hkv, n] float64.
    """
    layers, num_kv, length, _ = k.shape
    prefix = length - cfg.window
    out = np.empty((layers, num_kv, prefix))
    recorded: list[np.ndarray] = []
    for layer in range(layers):
        rows = attention_rows(q[layer], k[layer], cfg.window, scale)[:, :, :prefix]
        base = reduce_and_pool(rows.mean(axis=1), num_kv, cfg)
        if cfg.scorer == "snapkv":
            out[layer] = base
            continue
        last = reduce_and_pool(rows[:, -1], num_kv, cfg)
        trace = recorded[max(0, layer - cfg.trace_r) :]
        out[layer], evidence = boundary_calibration(base, last, trace, cfg.scored_budget, cfg)
        recorded.append(evidence)
    return out


def apportion(x: Sequence[Fraction | int], total: int, lo: int, hi: int) -> list[int]:
    """Round x to integers in [lo, hi] that sum to `total` (clamped to what is possible).

    Exact rationals, so equal remainders are equal and the lower index wins.
    """
    y = [min(max(Fraction(v), Fraction(lo)), Fraction(hi)) for v in x]
    out = [math.floor(v) for v in y]
    rest = min(max(total, lo * len(y)), hi * len(y)) - sum(out)
    step = 1 if rest > 0 else -1
    order = sorted(range(len(y)), key=lambda i: (-step * (y[i] - math.floor(y[i])), i))
    while rest != 0:
        for i in order:
            if rest != 0 and lo <= out[i] + step <= hi:
                out[i] += step
                rest -= step
    return out


def adakv_capacities(base: np.ndarray, cfg: OracleConfig) -> list[int]:
    """Scored tokens per KV head of one layer from its window score [Hkv, n]."""
    num_kv, prefix = base.shape
    share = cfg.scored_budget
    desc = descending(base)
    if cfg.normalize:
        desc = desc * (desc[:, :share].sum(axis=1) / desc.sum(axis=1))[:, None]
    # a stable sort of the row-major values breaks ties by head, then by rank inside the head
    winners = np.argsort(-desc.ravel(), kind="stable")[: num_kv * share]
    counts = np.bincount(winners // prefix, minlength=num_kv).tolist()
    if cfg.rounding == "official":
        floor = int(share * cfg.alpha)
        return [min(round(c * (1 - cfg.alpha) + floor), prefix) for c in counts]
    alpha = Fraction(str(cfg.alpha))
    return apportion([c * (1 - alpha) + share * alpha for c in counts], num_kv * share, 0, prefix)


def page_plan(length: int, cfg: OracleConfig) -> PagePlan:
    """Pages of a uniform head; nothing is dropped unless that is fewer than the full blocks."""
    full, tail = divmod(length, cfg.block_size)
    uniform = math.ceil(Fraction(cfg.budget - tail, cfg.block_size))
    return PagePlan(full, tail, uniform, full > uniform)


def head_pages(base: np.ndarray, plan: PagePlan, cfg: OracleConfig) -> list[int]:
    """Pages per KV head of one layer; their sum is `plan.uniform * Hkv` for every allocator."""
    num_kv = base.shape[0]
    if cfg.allocator == "uniform":
        return [plan.uniform] * num_kv
    pinned = cfg.window - plan.tail
    wanted = [Fraction(c + pinned, cfg.block_size) for c in adakv_capacities(base, cfg)]
    least = math.ceil(Fraction(max(0, pinned), cfg.block_size))
    return apportion(wanted, plan.uniform * num_kv, least, plan.full)


def best_positions(score: np.ndarray, count: int) -> np.ndarray:
    """The `count` best positions: score descending, then position ascending; NaN last."""
    return np.argsort(-score, kind="stable")[:count]


def kept_sets(q: np.ndarray, k: np.ndarray, cfg: OracleConfig, scale: float) -> KeptSets:
    """Prompt positions that every KV head keeps; q [L, Hq, P, D], k [L, Hkv, P, D]."""
    layers, num_kv, length, _ = k.shape
    plan = page_plan(length, cfg)
    if not plan.compressed:
        return [[np.arange(length) for _ in range(num_kv)] for _ in range(layers)]

    base = scores(q, k, replace(cfg, scorer="snapkv"), scale)
    final = base if cfg.scorer == "snapkv" else scores(q, k, cfg, scale)
    blocks_end = plan.full * cfg.block_size
    candidates_end = min(length - cfg.window, blocks_end)
    always = np.arange(candidates_end, length)
    out: KeptSets = []
    for layer in range(layers):
        heads = []
        for head, pages in enumerate(head_pages(base[layer], plan, cfg)):
            free = pages * cfg.block_size - (blocks_end - candidates_end)
            chosen = best_positions(final[layer, head, :candidates_end], free)
            heads.append(np.sort(np.concatenate([chosen, always])))
        out.append(heads)
    return out


class Oracle:
    """Greedy reference decoder of one checkpoint (float32, CPU, one request at a time)."""

    def __init__(self, model_dir: str) -> None:
        config = transformers.AutoConfig.from_pretrained(model_dir)
        model_cls = getattr(transformers, config.architectures[0])
        self.model = model_cls.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.model_dir = model_dir
        # only the language model is diverted; a vision tower stays on the eager path
        name = f"kv_oracle_{id(self)}"
        ALL_ATTENTION_FUNCTIONS.register(name, self._attend)
        self.text_config = self.model.config.get_text_config()
        self.text_config._attn_implementation = name
        self._captured: list[tuple[np.ndarray, np.ndarray]] = []
        self._scale = 0.0
        self._evicted: list[torch.Tensor] | None = None  # [L] of [Hkv, P]; None while in prefill

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, Hq, rows, D]
        key: torch.Tensor,  # [1, Hkv, cols, D], prompt and generated tokens
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention minus the evicted positions; records q and k of the prefill."""
        if attention_mask is not None or sliding_window is not None or softcap is not None:
            raise NotImplementedError("the oracle knows plain causal attention only")
        rows, cols = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        hidden = ~torch.ones(rows, cols, dtype=torch.bool).tril(cols - rows)
        if self._evicted is None:
            self._captured.append((query[0].numpy().copy(), key[0].numpy().copy()))
            self._scale = scaling
        else:
            evicted = self._evicted[module.layer_idx].repeat_interleave(group, dim=0)
            hidden = hidden.repeat(query.shape[1], 1, 1)
            hidden[:, :, : evicted.shape[1]] |= evicted[:, None, :]
        keys = key.repeat_interleave(group, dim=1)
        values = value.repeat_interleave(group, dim=1)
        logits = (query @ keys.transpose(2, 3)) * scaling
        weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return (weights @ values).transpose(1, 2).contiguous(), weights

    def _prompt_inputs(self, token_ids: Sequence[int], images: Any) -> dict[str, torch.Tensor]:
        """Model inputs of the prefill with explicit positions, [1, P] or M-RoPE [3, 1, P]."""
        input_ids = torch.tensor([list(token_ids)])
        if images is None:
            return {"input_ids": input_ids, "position_ids": torch.arange(len(token_ids))[None]}
        processor = transformers.AutoImageProcessor.from_pretrained(self.model_dir)
        vision = processor(images=images, return_tensors="pt")
        positions, _ = self.model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=(input_ids == self.model.config.image_token_id).int(),
            image_grid_thw=vision["image_grid_thw"],
        )
        return {"input_ids": input_ids, "position_ids": positions, **vision}

    def _prefill(self, inputs: dict[str, torch.Tensor]) -> tuple[Any, np.ndarray, np.ndarray]:
        self._evicted, self._captured = None, []
        result = self.model(**inputs, use_cache=True)
        q, k = (np.stack(tensors) for tensors in zip(*self._captured, strict=True))
        if len(q) != self.text_config.num_hidden_layers:
            raise RuntimeError(f"captured {len(q)} of {self.text_config.num_hidden_layers} layers")
        return result, q, k

    @torch.inference_mode()
    def capture(
        self, prompt_token_ids: Sequence[int], images: Any = None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """q [L, Hq, P, D], k [L, Hkv, P, D] (after norm and RoPE) and the softmax scale."""
        _, q, k = self._prefill(self._prompt_inputs(prompt_token_ids, images))
        return q, k, self._scale

    @torch.inference_mode()
    def generate(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        cfg: OracleConfig | None,
        images: Any = None,
    ) -> OracleOutput:
        """Greedy-decode exactly `max_tokens` tokens; `cfg=None` keeps the whole prompt.

        prompt_token_ids: already holds one placeholder token per image patch group.
        images: None, a PIL image or a list of them, in prompt order.
        """
        inputs = self._prompt_inputs(prompt_token_ids, images)
        result, q, k = self._prefill(inputs)
        layers, num_kv, length, _ = k.shape
        if cfg is None:
            kept = [[np.arange(length) for _ in range(num_kv)] for _ in range(layers)]
        else:
            kept = kept_sets(q, k, cfg, self._scale)
        evicted = torch.ones(layers, num_kv, length, dtype=torch.bool)
        for layer, heads in enumerate(kept):
            for head, positions in enumerate(heads):
                evicted[layer, head, torch.from_numpy(positions)] = False
        self._evicted = list(evicted)

        out = OracleOutput([], [], [], kept)
        # the next position follows the largest one of the prompt, which under M-RoPE is not P - 1
        positions = inputs["position_ids"]
        position = torch.full_like(positions[..., :1], int(positions.max()) + 1)
        while True:
            logp = torch.log_softmax(result.logits[0, -1].double(), dim=-1).numpy()
            best = np.argsort(-logp, kind="stable")[:TOP_LOGPROBS].tolist()
            out.token_ids.append(best[0])
            out.logprobs.append(float(logp[best[0]]))
            out.top5.append({token: float(logp[token]) for token in best})
            if len(out.token_ids) >= max_tokens:
                return out
            result = self.model(
                input_ids=torch.tensor([[best[0]]]),
                position_ids=position,
                past_key_values=result.past_key_values,
                use_cache=True,
            )
            position = position + 1
