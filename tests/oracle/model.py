# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of a compressed prompt, by a Hugging Face model on its full cache."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oracle.config import OracleConfig
from oracle.plan import KeptSets, Selection, keep_everything, merged_entries, page_plan, select
from oracle.prompt import Prompt, runs

TOP_LOGPROBS = 5


class OracleOutput(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]  # of the chosen tokens
    top5: list[dict[int, float]]  # token id -> log-probability, best first
    kept: KeptSets


class Oracle:
    """Greedy reference decoder of one checkpoint (float32, CPU, one request at a time).

    Layers with a sliding window, or whose attention ends at chunks, are never compressed, and those
    that read the cache of another have none; a layer index here counts the others.
    """

    def __init__(self, model_dir: str) -> None:
        config = transformers.AutoConfig.from_pretrained(model_dir)
        if config.model_type == "cohere2":
            config.sliding_window += 1  # vLLM says that they were trained so
        model_cls = getattr(transformers, config.architectures[0])
        self.model = model_cls.from_pretrained(
            model_dir, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.model_dir = model_dir
        # only the language model is diverted; a vision tower stays on the eager path
        name = f"kv_oracle_{id(self)}"
        ALL_ATTENTION_FUNCTIONS.register(name, self._attend)
        self.text_config = self.model.config.get_text_config()
        self.text_config._attn_implementation = name
        modules = dict(self.model.named_modules())
        # models without one attend to keys as they are
        self._rotary = next((m for n, m in modules.items() if n.endswith(".rotary_emb")), None)
        for module in modules.values():
            if hasattr(module, "q_proj") and hasattr(module, "layer_idx"):
                module.register_forward_pre_hook(self._read_inputs, with_kwargs=True)
        self._layers: list[torch.nn.Module] = []  # attention modules that are compressed
        self._captured: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # q, k, v
        self._hidden: dict[int, np.ndarray] = {}  # by the model's own layer index
        self._unrotated: set[int] = set()  # compressed layers without RoPE
        self._scale = 0.0
        self._length = 0  # tokens so far
        self._evicted: list[torch.Tensor] | None = None  # [L] of [Hkv, P]; None while in prefill

    def _read_inputs(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Record what an attention layer reads in the prefill."""
        if self._evicted is None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._hidden[module.layer_idx] = hidden[0].numpy().copy()

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
        """Causal attention minus the evicted positions; records q, k and v of the prefill."""
        if attention_mask is not None or softcap is not None:
            raise NotImplementedError("the oracle knows plain causal attention only")
        rows, cols = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        columns = torch.arange(self._length - cols, self._length)  # caches of chunks are short
        distance = columns[-rows:, None] - columns
        hidden = distance < 0
        chunk = self._chunk_size(module)
        reads = getattr(module, "is_kv_shared_layer", False)
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        elif chunk is not None:
            hidden |= columns[-rows:, None] // chunk != columns // chunk
        elif self._evicted is None and not reads:
            self._layers.append(module)
            self._captured.append(tuple(x[0].numpy().copy() for x in (query, key, value)))
            self._scale = scaling
        elif self._evicted is not None:
            # readers take the last cache of their kind
            owner = len(self._layers) - 1 if reads else self._layers.index(module)
            evicted = self._evicted[owner].repeat_interleave(group, dim=0)
            hidden = hidden.repeat(query.shape[1], 1, 1)
            hidden[:, :, : evicted.shape[1]] |= evicted[:, None, :]
        keys = key.repeat_interleave(group, dim=1)
        values = value.repeat_interleave(group, dim=1)
        logits = (query @ keys.transpose(2, 3)) * scaling
        weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return (weights @ values).transpose(1, 2).contiguous(), weights

    def _chunk_size(self, module: torch.nn.Module) -> int | None:
        """Tokens of the chunks that a layer attends in."""
        kinds = getattr(self.text_config, "layer_types", None) or ()
        is_chunked = len(kinds) > 0 and kinds[module.layer_idx] == "chunked_attention"
        return self.text_config.attention_chunk_size if is_chunked else None

    def _project(self, layer: int, inputs: np.ndarray) -> np.ndarray:
        """Queries [Hq, N, D] of inputs [N, d]: bias and norm included, RoPE not."""
        module = self._layers[layer]
        with torch.inference_mode():
            queries = module.q_proj(torch.from_numpy(inputs).float())
            queries = queries.unflatten(-1, (-1, module.head_dim))
            if hasattr(module, "q_norm"):
                queries = module.q_norm(queries)
            return queries.transpose(0, 1).numpy()

    def _rotate(self, layer: int, vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """RoPE of vectors [H, N, D] at positions [C, N], C = 3 under M-RoPE, else 1."""
        if layer in self._unrotated:
            return vectors
        module = self._layers[layer]
        source = sys.modules[type(module).__module__]
        x = torch.from_numpy(vectors).float()[None]
        ids = torch.from_numpy(positions)
        ids = ids if len(ids) == 1 else ids[:, None]
        kinds = getattr(self.text_config, "layer_types", None)
        # models with sliding windows have one RoPE for each kind of layer
        kind = [kinds[module.layer_idx]] if hasattr(self._rotary, "layer_types") else []
        with torch.inference_mode():
            cos, sin = self._rotary(x, ids, *kind)
            rotate = source.apply_rotary_pos_emb
            if len(inspect.signature(rotate).parameters) == 4:  # Gemma 4 turns q and k one by one
                return rotate(x, cos, sin)[0].numpy()
            return rotate(x, x, cos, sin)[0][0].numpy()

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

    def _prefill(self, inputs: dict[str, torch.Tensor]) -> tuple[Any, Prompt]:
        """The model's answer to the prompt, its cache included, and what methods see of it."""
        self._evicted, self._captured, self._layers, self._hidden = None, [], [], {}
        self._length = inputs["input_ids"].shape[1]
        result = self.model(**inputs, use_cache=True)
        q, k, v = (np.stack(tensors) for tensors in zip(*self._captured, strict=True))
        hidden = np.stack([self._hidden[module.layer_idx] for module in self._layers])
        raw_q = np.stack([self._project(layer, x) for layer, x in enumerate(hidden)])
        # some models leave RoPE out where they attend fully
        self._unrotated = {i for i, raw in enumerate(raw_q) if np.allclose(raw, q[i], atol=1e-4)}
        image_token = getattr(self.model.config, "image_token_id", None)
        segments = (
            runs((inputs["input_ids"][0] == image_token).numpy())
            if "pixel_values" in inputs
            else ()
        )
        prompt = Prompt(
            q=q,
            k=k,
            v=v,
            scale=self._scale,
            segments=segments,
            grids=self._grids(segments, inputs),
            wo=self._output_projections(q.shape[1]),
            positions=inputs["position_ids"].flatten(0, -2).numpy(),
            hidden=hidden,
            raw_q=raw_q,
            project=self._project,
            rotate=self._rotate,
            layers=[module.layer_idx for module in self._layers],
        )
        return result, prompt

    def _grids(
        self, segments: Sequence[tuple[int, int]], inputs: dict[str, torch.Tensor]
    ) -> list[tuple[int, int, int]]:
        """First position, rows and columns of the images."""
        if "image_grid_thw" not in inputs:
            return []
        merge = self.model.config.vision_config.spatial_merge_size
        sizes = inputs["image_grid_thw"].tolist()
        return [
            (start, rows // merge, columns // merge)
            for (start, _), (_, rows, columns) in zip(segments, sizes, strict=True)
        ]

    def _output_projections(self, num_heads: int) -> np.ndarray | None:
        """[L, Hq, D, d]; None where a layer has none of the usual name."""
        if not all(hasattr(module, "o_proj") for module in self._layers):
            return None
        weights = [module.o_proj.weight.detach().numpy() for module in self._layers]
        return np.stack([w.T.reshape(num_heads, -1, len(w)) for w in weights])

    @torch.inference_mode()
    def prompt(self, prompt_token_ids: Sequence[int], images: Any = None) -> Prompt:
        """What an uncompressed prefill leaves behind."""
        return self._prefill(self._prompt_inputs(prompt_token_ids, images))[1]

    def capture(
        self, prompt_token_ids: Sequence[int], images: Any = None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """q [L, Hq, P, D], k [L, Hkv, P, D] (after norm and RoPE) and the softmax scale."""
        prompt = self.prompt(prompt_token_ids, images)
        return prompt.q, prompt.k, prompt.scale

    def select(self, prompt: Prompt, cfg: OracleConfig) -> Selection:
        """What every KV head keeps; for tests whose heads live on several ranks to override."""
        return select(prompt, cfg)

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
        result, prompt = self._prefill(inputs)
        if cfg is None:
            whole = page_plan(prompt.length, OracleConfig(prompt.length + 1, window=1))
            selection = keep_everything(prompt, whole)
        else:
            selection = self.select(prompt, cfg)
        self._evict(prompt, selection, cfg, result.past_key_values)

        out = OracleOutput([], [], [], selection.kept)
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
            self._length += 1
            result = self.model(
                input_ids=torch.tensor([[best[0]]]),
                position_ids=position,
                past_key_values=result.past_key_values,
                use_cache=True,
            )
            position = position + 1

    def _evict(
        self, prompt: Prompt, selection: Selection, cfg: OracleConfig | None, cache: Any
    ) -> None:
        """Hide what was dropped from the next steps, and write merged entries into the cache."""
        evicted = torch.ones(prompt.num_layers, prompt.num_kv, prompt.length, dtype=torch.bool)
        entries = [] if cfg is None else merged_entries(prompt, selection, cfg)
        for layer, heads in enumerate(selection.kept):
            for head, positions in enumerate(heads):
                evicted[layer, head, torch.from_numpy(positions)] = False
                if not entries:
                    continue
                slots, keys, values = entries[layer][head]
                evicted[layer, head, torch.from_numpy(slots)] = False
                held = cache.layers[self._layers[layer].layer_idx]
                held.keys[0, head, slots] = torch.from_numpy(keys).float()
                held.values[0, head, slots] = torch.from_numpy(values).float()
        self._evicted = list(evicted)
