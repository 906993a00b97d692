# SPDX-License-Identifier: Apache-2.0
"""Scheduler side: the spec of a compressed layer and the manager of its blocks.

Importing this module registers both with vLLM. A process that holds a compressed spec has imported
it, and no other process is touched.
"""

import contextvars
import dataclasses
from dataclasses import dataclass

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.telemetry import SchedulerTelemetry
from vllm_kvcompress.plan import BlockPlanner, PromptPlan

_hit_cap: contextvars.ContextVar[int | None] = contextvars.ContextVar("hit_cap", default=None)


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """A full-attention layer whose prompts are compressed.

    Attributes:
        window, budget_tokens, budget_ratio: see ``BlockPlanner``.
    """

    window: int
    budget_tokens: int | None = None
    budget_ratio: float | None = None

    @property
    def planner(self) -> BlockPlanner:
        return BlockPlanner(self.block_size, self.window, self.budget_tokens, self.budget_ratio)

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
        return cls.of(plain, **extra)

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
        self._planner = kv_cache_spec.planner
        self._telemetry = SchedulerTelemetry()

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
        plan = self._planner.plan(num_prompt_tokens)
        blocks = self.req_to_blocks.get(request_id)
        if not plan.compresses or not blocks or blocks[plan.num_freed_blocks - 1].is_null:
            return
        held = sum(not block.is_null for block in blocks)
        before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, 0, plan.num_freed_blocks)
        freed = self.block_pool.get_num_free_blocks() - before
        self._telemetry.record(held, held - plan.num_freed_blocks, freed)

    def cache_blocks(self, request, num_tokens: int, *args, **kwargs) -> None:
        plan = self._planner.plan(request.num_prompt_tokens)
        if plan.compresses:
            num_tokens = min(num_tokens, plan.max_hit)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length: int, *args, **kwargs):
        cap = _hit_cap.get()
        if cap is not None:
            max_length = min(max_length, cap)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)


def plan_for(manager: KVCacheManager, num_prompt_tokens: int) -> PromptPlan | None:
    """The plan that the manager's compressed group has for a prompt; None without such a group."""
    for group in manager.kv_cache_config.kv_cache_groups:
        if isinstance(group.kv_cache_spec, CompressedSpec):
            return group.kv_cache_spec.planner.plan(num_prompt_tokens)
    return None


def _cap_hits(original):
    def get_computed_blocks(self: KVCacheManager, request, *args, **kwargs):
        plan = plan_for(self, request.num_prompt_tokens)
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


KVCacheSpecRegistry._ensure_registered()  # before ours: it fills an empty registry only
KVCacheSpecRegistry.register(
    CompressedSpec, CompressedManager, uniform_type_base_spec=FullAttentionSpec
)
wrap(KVCacheManager, "get_computed_blocks", _cap_hits)
