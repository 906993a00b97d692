# SPDX-License-Identifier: Apache-2.0
"""What goes into an attention layer before RoPE: hidden states, queries and positions.

vLLM hands its attention layers finished queries only. Where a method needs more, hooks on the
modules around the compressed ones copy it into buffers that the attention layer reads a moment
later. The copy is an operator of its own, so that compiled models keep it.

Models differ in what they do to a query. What is assumed here is compared with what each layer
really does to a few random rows, when the engine starts.
"""

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.attention.attention import Attention

from vllm_kvcompress.adapter import lora
from vllm_kvcompress.adapter.backend import compressed_modules
from vllm_kvcompress.adapter.compression_config import compression_choices
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.scoring import Need

CAPTURED = Need.HIDDEN_MOMENTS | Need.QUERY_MOMENTS


@torch.library.custom_op("vllm_kvcompress::copy_rows", mutates_args=("target",))
def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write ``source`` over the first rows of ``target``.

    Engines of one process share modules, and so do layers that are compressed and others: what
    these leave here is overwritten before it is read, and where it has no room it is not kept.
    """
    if source.shape[0] <= target.shape[0] and source.shape[1:] == target.shape[1:]:
        target[: source.shape[0]].copy_(source)


@copy_rows.register_fake
def _(target: torch.Tensor, source: torch.Tensor) -> None:
    return None


@dataclass
class AttentionInputs:
    """Inputs of one attention layer in the step that runs, and the modules that made them.

    The buffers are shared by all compressed layers: each overwrites what the one before it left.

    Attributes:
        qkv_proj, rotary_emb, q_norm: of the layer; ``rotary_emb`` None where it does not rotate,
            ``q_norm`` None when the model has none.
        hidden: [tokens, d], input of ``qkv_proj``.
        queries: [tokens, Hq * D], before RoPE; garbage where the layer does not rotate.
        positions: [tokens, 1] or [tokens, 3] under M-RoPE; of layers that rotate.
    """

    qkv_proj: nn.Module
    rotary_emb: nn.Module | None
    q_norm: nn.Module | None
    hidden: torch.Tensor
    queries: torch.Tensor
    positions: torch.Tensor


_inputs: "weakref.WeakKeyDictionary[nn.Module, AttentionInputs]" = weakref.WeakKeyDictionary()
"""By attention layer."""


def inputs_of(layer: nn.Module) -> AttentionInputs:
    return _inputs[layer]


def install(
    model: nn.Module, vllm_config: VllmConfig, lora_manager: WorkerLoRAManager | None = None
) -> None:
    """Hook the compressed layers of a model whose engine needs their inputs.

    Args:
        lora_manager: the runner's, of engines with adapters.

    Raises:
        KVCompressionError: a layer makes its queries in a way that is not known here.
    """
    choices = compression_choices(vllm_config)
    if choices is None or not choices.needs & CAPTURED:
        return
    compressed = compressed_modules(vllm_config)
    if all(layer in _inputs for layer in compressed):
        return  # vLLM asks for specs twice when it profiles graphs
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    buffers = _buffers(compressed[0], vllm_config)
    hooked: set[nn.Module] = set()
    for layer in compressed:
        inputs = _inputs_like(layer, parents.get(layer), buffers, vllm_config, lora_manager)
        _inputs[layer] = inputs
        if inputs.qkv_proj not in hooked:
            inputs.qkv_proj.register_forward_pre_hook(_keep_hidden(inputs.hidden))
        if inputs.rotary_emb is not None and inputs.rotary_emb not in hooked:  # many share one
            inputs.rotary_emb.register_forward_pre_hook(
                _keep_queries(inputs.queries, inputs.positions)
            )
            hooked.add(inputs.rotary_emb)
        hooked.add(inputs.qkv_proj)


def _buffers(layer: Attention, vllm_config: VllmConfig) -> dict[str, torch.Tensor]:
    """Room for the inputs of any step; the compressed layers are alike."""
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
    device, dtype = vllm_config.device_config.device, model.dtype
    assert isinstance(dtype, torch.dtype), "vLLM has resolved it"
    widths = {
        "hidden": (model.get_hidden_size(), dtype),
        "queries": (layer.num_heads * layer.head_size, dtype),
        "positions": (3 if model.uses_mrope else 1, torch.int64),
    }
    return {
        name: torch.zeros(tokens, width, dtype=kind, device=device)
        for name, (width, kind) in widths.items()
    }


_SAMPLE = 4
"""Rows that a layer is tried with."""


def _inputs_like(
    layer: Attention,
    parent: nn.Module | None,
    buffers: dict[str, torch.Tensor],
    vllm_config: VllmConfig,
    lora_manager: WorkerLoRAManager | None,
) -> AttentionInputs:
    """A layer's inputs, and whether it rotates its queries, found by trying it.

    Raises:
        KVCompressionError: what it does to its queries is not what ``StackProjector`` does.
    """
    choices = compression_choices(vllm_config)
    assert choices is not None
    looking = [config for config in choices.configs if config.needs & CAPTURED]
    scorer = looking[0].scorer
    lookahead = max(config.scoring.lookahead for config in looking)

    def refuse(why: str) -> KVCompressionError:
        return KVCompressionError(
            f"{scorer} looks at attention inputs, and {layer.layer_name} {why}: use a "
            "scorer such as bacon, which works on finished queries and keys."
        )

    parts = {} if parent is None else dict(parent.named_children())
    if parent is None or not {"qkv_proj", "rotary_emb"} <= parts.keys():
        raise refuse("is not built from qkv_proj and rotary_emb")
    rotary = parts["rotary_emb"]
    table = dict(rotary.named_buffers()).get("cos_sin_cache")
    if table is None or not _takes(parent, "positions", "hidden_states"):
        raise refuse("is called, or rotates, in an unusual way")
    qkv_proj, width = parts["qkv_proj"], layer.num_heads * layer.head_size
    if Need.HIDDEN_MOMENTS in choices.needs:
        reasons = lora.conflicts(qkv_proj, width, vllm_config)
        if reasons:
            raise KVCompressionError.from_reasons(
                [f"{scorer} projects rows of its own; {reason}." for reason in reasons]
            )
    if lora_manager is not None:
        nobody = LoRAMapping((0,) * _SAMPLE, (0,), is_prefill=True)
        lora_manager.set_active_adapters(set(), nobody)
    inputs = AttentionInputs(qkv_proj, rotary, parts.get("q_norm"), **buffers)
    positions = torch.arange(1, _SAMPLE + 1, device=buffers["positions"].device)
    positions = positions * (len(table) - 1) // _SAMPLE
    found = _try(parent, layer, inputs, positions, buffers["positions"].shape[1])
    shape = (1, _SAMPLE, layer.num_heads, layer.head_size)
    for rotary_emb in (rotary, None):
        inputs.rotary_emb = rotary_emb
        slots = torch.full((1,), lora.NO_ADAPTER, device=positions.device)
        stack = StackProjector([inputs], torch.zeros_like(slots), *shape[2:], slots)
        made = stack.project(range(1), found.hidden[None].float(), positions)
        if _close(made, found.after.view(shape)):
            break
    else:
        raise refuse("makes its queries in another way than by qkv_proj, q_norm and rotary_emb")
    if inputs.rotary_emb is None:
        return inputs
    if Need.QUERY_MOMENTS in choices.needs and found.before is None:
        raise refuse("does not call its rotary_emb")
    reach = vllm_config.model_config.max_model_len + lookahead
    if reach > len(table):
        raise KVCompressionError(
            f"{scorer} looks {lookahead} positions past a prompt, and the model rotates to "
            f"{len(table)} positions only: set --max-model-len {len(table) - lookahead} or less."
        )
    return inputs


def _takes(module: nn.Module, *names: str) -> bool:
    try:
        inspect.signature(module.forward).bind(**dict.fromkeys(names))
    except TypeError:
        return False
    return True


class _Tried(NamedTuple):
    """What an attention module did to a few rows.

    Attributes:
        hidden: [M, d] input of its qkv_proj.
        before, after: [M, Hq * D] input of its rotary_emb, None if it was not called, and queries
            that reached attention.
    """

    hidden: torch.Tensor
    before: torch.Tensor | None
    after: torch.Tensor


@torch.inference_mode()
def _try(
    parent: nn.Module,
    layer: Attention,
    inputs: AttentionInputs,
    positions: torch.Tensor,
    components: int,
) -> _Tried:
    """Run an attention module on random rows at the given positions, without attention."""
    seen: dict[str, torch.Tensor] = {}
    assert inputs.rotary_emb is not None
    handles = [
        inputs.qkv_proj.register_forward_pre_hook(
            lambda _, args: seen.update(hidden=args[0].clone())
        ),
        inputs.rotary_emb.register_forward_pre_hook(
            lambda _, args: seen.update(before=args[1].clone())
        ),
    ]

    def attend(query: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        seen["after"] = query.clone()
        return torch.zeros_like(query)

    size = inputs.hidden.shape[1]
    rows = torch.randn(len(positions), size, generator=torch.Generator().manual_seed(0))
    vars(layer)["forward"] = attend
    try:
        parent(
            positions=positions if components == 1 else positions.expand(components, -1),
            hidden_states=rows.to(inputs.hidden),
        )
    finally:
        del vars(layer)["forward"]
        for handle in handles:
            handle.remove()
    return _Tried(seen["hidden"], seen.get("before"), seen["after"])


def _close(made: torch.Tensor, found: torch.Tensor) -> bool:
    """Equal but for rounding in the model's type; another rotation differs by the whole size."""
    error = (made - found.float()).abs().max()
    return bool(error <= 0.05 * found.float().abs().max())


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
        adapter_slots: [N] int64, see ``lora.RequestAdapters.slots``; None without adapters.
    """

    inputs: Sequence[AttentionInputs]
    last: torch.Tensor
    num_heads: int
    head_size: int
    adapter_slots: torch.Tensor | None = None

    def project(self, layers: range, hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """[R, M, d] float32 and offsets [M] int64 -> rotated queries [R, M, Hq, D] float32."""
        found = []
        for layer_idx, rows in zip(layers, hidden.chunk(len(layers)), strict=True):
            inputs = self.inputs[layer_idx]
            queries = lora.project(
                inputs.qkv_proj,
                rows.to(inputs.hidden.dtype),
                self.num_heads * self.head_size,
                self.adapter_slots,
            ).unflatten(2, (self.num_heads, self.head_size))
            if inputs.q_norm is not None:
                queries = inputs.q_norm.forward(queries.contiguous())
                queries = queries[0] if isinstance(queries, tuple) else queries
            found.append(queries)
        return self.rotate(layers, torch.cat(found), offsets)

    def rotate(self, layers: range, queries: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """RoPE of [R, M, H, D] at offsets [M] int64, float32; one call per rotary module.

        Rows of layers that do not rotate come back as they are.
        """
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
            if inputs.rotary_emb is None:
                out[where] = chosen
                continue
            flat = chosen.flatten(0, 2).flatten(1).to(inputs.hidden.dtype).contiguous()
            positions = (self.last[:, None] + offsets).expand(len(members), -1, -1).reshape(-1)
            # a module may turn both in place: the keys that it asks for are a head of their own
            turned, _ = inputs.rotary_emb.forward(
                positions, flat, flat[:, : chosen.shape[-1]].clone()
            )
            out[where] = turned.view(chosen.shape)
        return rotated

    def shares_rotation(self, layers: range) -> bool:
        """Whether all of the layers rotate alike."""
        return len({id(self.inputs[layer_idx].rotary_emb) for layer_idx in layers}) == 1

    def of_prompts(self, prompts: slice) -> "StackProjector":
        """The same for some of the N prompts."""
        slots = None if self.adapter_slots is None else self.adapter_slots[prompts]
        return replace(self, last=self.last[prompts], adapter_slots=slots)
