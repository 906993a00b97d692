# SPDX-License-Identifier: Apache-2.0
"""Scheduler side: the spec of a compressed layer and the manager of its blocks.

Importing this module registers both with vLLM. A process that holds a compressed spec has imported
it, and no other process is touched.
"""

import contextvars
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.telemetry import SchedulerTelemetry
from vllm_kvcompress.plan import BlockPlanner, PromptPlan
from vllm_kvcompress.prompt import PromptFacts, Run, split_evenly

_hit_cap: contextvars.ContextVar[int | None] = contextvars.ContextVar("hit_cap", default=None)


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """A full-attention layer whose prompts are compressed.

    Attributes:
        settings: the configuration as JSON.
        model_kv_heads: KV heads of the model, over all ranks.
        num_layers: layers that share the spec; 0 until vLLM has grouped them.
    """

    settings: str
    model_kv_heads: int
    num_layers: int = 0

    @property
    def planner(self) -> BlockPlanner:
        assert self.num_layers, "plans are made from the spec of a group"
        return BlockPlanner(self.settings, self.block_size, self.num_layers, self.model_kv_heads)

    @classmethod
    def merge(cls, specs):
        """Merge equal settings; vLLM's own merge builds the result from its own fields only."""
        # vLLM tries to merge any layers and takes an AssertionError for a no
        assert all(isinstance(spec, cls) for spec in specs), "compressed with uncompressed layers"
        extra = {
            f.name: getattr(specs[0], f.name)
            for f in dataclasses.fields(cls)
            if f.name not in {g.name for g in dataclasses.fields(FullAttentionSpec)}
        }
        assert all(getattr(spec, name) == value for spec in specs for name, value in extra.items())
        plain = FullAttentionSpec.merge([spec.plain() for spec in specs])
        return cls.of(plain, **{**extra, "num_layers": len(specs)})

    @classmethod
    def of(cls, spec: FullAttentionSpec, **extra) -> "CompressedSpec":
        """``spec`` with our fields added."""
        fields = {
            f.name: getattr(spec, f.name) for f in dataclasses.fields(FullAttentionSpec) if f.init
        }
        return cls(**fields, **extra)

    def plain(self) -> FullAttentionSpec:
        fields = dataclasses.fields(FullAttentionSpec)
        return FullAttentionSpec(**{f.name: getattr(self, f.name) for f in fields if f.init})


class CompressedManager(FullAttentionManager):
    """Returns the blocks that compaction empties; keeps private ones out of the prefix cache."""

    def __init__(self, kv_cache_spec: CompressedSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.planner = kv_cache_spec.planner
        self._plans: dict[str, PromptPlan] = {}
        self._telemetry = SchedulerTelemetry()

    def plan_of(self, request: Request) -> PromptPlan:
        """The request's plan, remembered until its blocks are freed."""
        if request.request_id not in self._plans:
            self._plans[request.request_id] = self.planner.plan(
                prompt_facts(request.num_prompt_tokens, request.mm_features)
            )
        return self._plans[request.request_id]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._plans.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what precedes the kept blocks once a worker has surely compacted the prompt.

        ``processed_computed_tokens`` counts tokens of finished steps only, so nothing in flight
        still reads the freed blocks.
        """
        assert num_prompt_tokens is not None, "vLLM always passes the prompt length"
        if processed_computed_tokens < num_prompt_tokens:
            return
        plan, blocks = self._plans[request_id], self.req_to_blocks.get(request_id)
        if not plan.compresses or not blocks or blocks[plan.num_freed_blocks - 1].is_null:
            return
        held = sum(not block.is_null for block in blocks)
        before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, 0, plan.num_freed_blocks)
        freed = self.block_pool.get_num_free_blocks() - before
        self._telemetry.record(held, held - plan.num_freed_blocks, freed)

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        plan = self.plan_of(request)
        if plan.compresses:
            # those past a hit cap are hashed all the same: other methods' caps may lie higher
            num_tokens = min(num_tokens, plan.num_freed_blocks * self.block_size)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length: int, *args, **kwargs):
        cap = _hit_cap.get()
        if cap is not None:
            max_length = min(max_length, cap)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)


def prompt_facts(length: int, features: Iterable[MultiModalFeatureSpec]) -> PromptFacts:
    """Length and visual tokens of a prompt, from vLLM's multimodal features."""
    items: list[list[Run]] = []
    for feature in features:
        if feature.modality in ("image", "video"):
            ranges = feature.mm_position.extract_embeds_range()
            runs = [(start, end + 1) for start, end in ranges]
            items += split_evenly(runs, temporal_patches(feature)) if runs else []
    return PromptFacts.from_items(length, items)


def temporal_patches(feature: MultiModalFeatureSpec) -> int:
    """Of a video whose processor tells its grid (the Qwen-VL families); else 1.

    A scheduler may hold features without data. It counts visual tokens only, whatever their patch.
    """
    grid = feature.data.get("video_grid_thw") if feature.data is not None else None
    return int(grid.data.view(-1)[0]) if grid and isinstance(grid.data, torch.Tensor) else 1


def manager_of(manager: KVCacheManager) -> CompressedManager | None:
    """The manager of the compressed group; None when nothing is compressed."""
    for each in manager.coordinator.single_type_managers:
        if isinstance(each, CompressedManager):
            return each
    return None


def _cap_hits(original):
    def get_computed_blocks(self: KVCacheManager, request, *args, **kwargs):
        compressed = manager_of(self)
        plan = compressed.plan_of(request) if compressed is not None else None
        if plan is None or not plan.compresses:
            return original(self, request, *args, **kwargs)
        token = _hit_cap.set(plan.max_hit)
        try:
            blocks, num_hit, boundary = original(self, request, *args, **kwargs)
        finally:
            _hit_cap.reset(token)
        if self.num_kv_cache_groups > 1:
            # hybrid models retain sliding-window blocks at such junctions only: hits end at ours
            boundary = boundary or plan.max_hit
        return blocks, num_hit, boundary

    return get_computed_blocks


def _split_at_prompts_end(original):
    def _mamba_block_aligned_split(
        self: Scheduler, request, num_new_tokens: int, *computed: int
    ) -> int:
        if self.has_mamba_layers:
            num_new_tokens = original(self, request, num_new_tokens, *computed)
        left = request.num_prompt_tokens - request.num_computed_tokens - sum(computed)
        return min(num_new_tokens, left) if left > 0 else num_new_tokens

    return _mamba_block_aligned_split


def _ask_for_split(original):
    def __init__(self: Scheduler, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        compressed = manager_of(self.kv_cache_manager)
        if compressed is not None and compressed.planner.config.spans_layers:
            # Pages that move between layers are written after the last layer, so replayed outputs
            # of a preempted request must not share a step with the end of its prompt. vLLM offers
            # the scheduler's one hook for such a split to Mamba layers only.
            self.need_mamba_block_aligned_split = True

    return __init__


KVCacheSpecRegistry._ensure_registered()  # before ours: it fills an empty registry only
KVCacheSpecRegistry.register(
    CompressedSpec, CompressedManager, uniform_type_base_spec=FullAttentionSpec
)
wrap(KVCacheManager, "get_computed_blocks", _cap_hits)
wrap(Scheduler, "__init__", _ask_for_split)
wrap(Scheduler, "_mamba_block_aligned_split", _split_at_prompts_end)
