# SPDX-License-Identifier: Apache-2.0
"""What goes into an attention layer before RoPE: hidden states, queries and positions.

vLLM hands its attention layers finished queries only. Where a method needs more, hooks on the
modules around them copy it into buffers that the attention layer reads a moment later. The copy is
an operator of its own, so that compiled models keep it.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention

from vllm_kvcompress.adapter.compression_config import compression_config
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.scoring import Need

CAPTURED = Need.HIDDEN_MOMENTS | Need.QUERY_MOMENTS


@torch.library.custom_op("vllm_kvcompress::copy_rows", mutates_args=("target",))
def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write ``source`` over the first rows of ``target``.

    Engines of one process share modules, so another engine's step may come through here. Nothing
    reads what it leaves, and where it has no room it belongs to nobody here.
    """
    if source.shape[0] <= target.shape[0]:
        target[: source.shape[0]].copy_(source)


@copy_rows.register_fake
def _(target: torch.Tensor, source: torch.Tensor) -> None:
    return None


@dataclass
class AttentionInputs:
    """Inputs of one attention layer in the step that runs, and the modules that made them.

    The buffers are shared by all layers: each overwrites what the one before it left.

    Attributes:
        qkv_proj, rotary_emb, q_norm: of the layer; ``q_norm`` None when the model has none.
        hidden: [tokens, d], input of ``qkv_proj``.
        queries: [tokens, Hq * D], before RoPE.
        positions: [tokens, 1] or [tokens, 3] under M-RoPE.
    """

    qkv_proj: nn.Module
    rotary_emb: nn.Module
    q_norm: nn.Module | None
    hidden: torch.Tensor
    queries: torch.Tensor
    positions: torch.Tensor


_inputs: "weakref.WeakKeyDictionary[nn.Module, AttentionInputs]" = weakref.WeakKeyDictionary()
"""By attention layer."""


def inputs_of(layer: nn.Module) -> AttentionInputs:
    return _inputs[layer]


def install(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Hook the attention layers of a model whose engine needs their inputs.

    Raises:
        KVCompressionError: a layer is not built from qkv_proj and rotary_emb.
    """
    config = compression_config(vllm_config)
    if config is None or not config.needs & CAPTURED:
        return
    layers = vllm_config.compilation_config.static_forward_context
    decoders = [layer for layer in layers.values() if isinstance(layer, Attention)]
    if all(layer in _inputs for layer in decoders):
        return  # vLLM asks for specs twice when it profiles graphs
    scheduler, model_config = vllm_config.scheduler_config, vllm_config.model_config
    tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    hooked: set[nn.Module] = set()
    buffers: dict[str, torch.Tensor] = {}
    for layer in decoders:
        parts = dict(parents[layer].named_children()) if layer in parents else {}
        if not {"qkv_proj", "rotary_emb"} <= parts.keys():
            raise KVCompressionError(
                f"{config.scorer} looks at attention inputs, and {layer.layer_name} is not built "
                "from qkv_proj and rotary_emb: use a scorer such as bacon, which works on finished "
                "queries and keys."
            )
        reach = model_config.max_model_len + config.scoring.lookahead
        num_positions = len(parts["rotary_emb"].get_buffer("cos_sin_cache"))
        if reach > num_positions:
            raise KVCompressionError(
                f"{config.scorer} looks {config.scoring.lookahead} positions past a prompt, "
                f"and the model rotates to {num_positions} positions only: set --max-model-len "
                f"{num_positions - config.scoring.lookahead} or less."
            )
        if not buffers:
            like = next(parts["qkv_proj"].parameters())
            dtype = model_config.dtype
            assert isinstance(dtype, torch.dtype), "vLLM has resolved it"
            sizes = {
                "hidden": model_config.get_hidden_size(),
                "queries": layer.num_heads * layer.head_size,
            }
            for name, size in sizes.items():
                buffers[name] = torch.zeros(tokens, size, dtype=dtype, device=like.device)
            width = 3 if model_config.uses_mrope else 1
            buffers["positions"] = torch.zeros(tokens, width, dtype=torch.int64, device=like.device)
        inputs = AttentionInputs(
            parts["qkv_proj"], parts["rotary_emb"], parts.get("q_norm"), **buffers
        )
        _inputs[layer] = inputs
        if inputs.qkv_proj not in hooked:
            inputs.qkv_proj.register_forward_pre_hook(_keep_hidden(buffers["hidden"]))
        if inputs.rotary_emb not in hooked:  # many layers share one
            inputs.rotary_emb.register_forward_pre_hook(
                _keep_queries(buffers["queries"], buffers["positions"])
            )
        hooked |= {inputs.qkv_proj, inputs.rotary_emb}


def _keep_hidden(buffer: torch.Tensor):
    def keep(module: nn.Module, args: tuple) -> None:
        torch.ops.vllm_kvcompress.copy_rows(buffer, args[0])

    return keep


def _keep_queries(queries: torch.Tensor, positions: torch.Tensor):
    def keep(module: nn.Module, args: tuple) -> None:
        position, query = args[0], args[1]
        torch.ops.vllm_kvcompress.copy_rows(queries, query.reshape(query.shape[0], -1))
        # text-only batches of an M-RoPE model may come with one component
        rows = position.view(-1, position.shape[-1]).t().expand(-1, positions.shape[1])
        torch.ops.vllm_kvcompress.copy_rows(positions, rows)

    return keep


@dataclass
class StackProjector:
    """The layers' own way from hidden states to queries (a ``QueryProjector``).

    Attributes:
        inputs: of each layer.
        last: [N] int64, largest component of the last prompt token's position.
        num_heads, head_size: Hq of this rank, D.
    """

    inputs: Sequence[AttentionInputs]
    last: torch.Tensor
    num_heads: int
    head_size: int

    def project(self, layers: range, hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """[R, M, d] float32 and offsets [M] int64 -> rotated queries [R, M, Hq, D] float32."""
        found = []
        for layer_idx, rows in zip(layers, hidden.chunk(len(layers)), strict=True):
            inputs = self.inputs[layer_idx]
            num, count, size = rows.shape
            rows = rows.reshape(num * count, size).to(inputs.hidden.dtype)
            # not called as modules: that would run our own hooks
            queries = inputs.qkv_proj.forward(rows)[0][:, : self.num_heads * self.head_size]
            queries = queries.reshape(num, count, self.num_heads, self.head_size)
            if inputs.q_norm is not None:
                queries = inputs.q_norm.forward(queries.contiguous())
            found.append(queries)
        return self.rotate(layers, torch.cat(found), offsets)

    def rotate(self, layers: range, queries: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """RoPE of [R, M, H, D] at offsets [M] int64, float32; one call per rotary module."""
        rotated = torch.empty_like(queries, dtype=torch.float32)
        rows = queries.unflatten(0, (len(layers), -1))
        out = rotated.unflatten(0, (len(layers), -1))
        groups: dict[int, list[int]] = {}
        for index, layer_idx in enumerate(layers):
            groups.setdefault(id(self.inputs[layer_idx].rotary_emb), []).append(index)
        for members in groups.values():
            # all layers share one module as a rule; a list of indices would wait for the device
            where = slice(None) if len(groups) == 1 else torch.tensor(members).to(queries.device)
            inputs = self.inputs[layers[members[0]]]
            chosen = rows[where]  # [L', N, M, H, D]
            flat = chosen.flatten(0, 2).flatten(1).to(inputs.hidden.dtype).contiguous()
            positions = (self.last[:, None] + offsets).expand(len(members), -1, -1).reshape(-1)
            turned, _ = inputs.rotary_emb.forward(positions, flat, flat.clone())
            out[where] = turned.view(chosen.shape).float()
        return rotated

    def shares_rotation(self, layers: range) -> bool:
        """Whether all of the layers rotate alike."""
        return len({id(self.inputs[layer_idx].rotary_emb) for layer_idx in layers}) == 1

    def of_prompts(self, prompts: slice) -> "StackProjector":
        """The same for some of the N prompts."""
        return replace(self, last=self.last[prompts])
