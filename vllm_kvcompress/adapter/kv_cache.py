# SPDX-License-Identifier: Apache-2.0
"""Scheduler side: the spec of a compressed layer and the manager of its blocks.

Importing this module registers both with vLLM. A process that holds a compressed spec has imported
it, and no other process is touched.
"""

import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_kvcompress.adapter.telemetry import SchedulerTelemetry
from vllm_kvcompress.choices import Choices, RequestSettings
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.orders import CompressionOrder
from vllm_kvcompress.plan import BlockPlanner, PromptPlan
from vllm_kvcompress.policy import Outcome, When
from vllm_kvcompress.prompt import PromptFacts, Run, split_evenly

_hit_cap: contextvars.ContextVar[int | None] = contextvars.ContextVar("hit_cap", default=None)


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """A full-attention layer whose prompts are compressed.

    Attributes:
        config: how they are compressed.
        kernel_block_size: tokens of a block as attention kernels see it. A block of the pool is
            one of these, or several: vLLM makes it as large as the state of a Mamba layer.
        model_kv_heads: KV heads of the model, over all ranks.
        entry_bytes: what a worker keeps, per layer, of a prompt that waits for its compression.
        max_entries: most prompts that can wait at the same time.
        num_layers: layers that share the spec; 0 until vLLM has grouped them.
    """

    config: KVCompressionConfig
    kernel_block_size: int
    model_kv_heads: int
    entry_bytes: int = 0
    max_entries: int = 1
    num_layers: int = 0

    @property
    def choices(self) -> Choices:
        """What requests may choose beside ``config``."""
        return Choices.of(self.config, self.kernel_block_size)

    @property
    def num_entries(self) -> int:
        """Prompts that a worker has room for; at least one, so that every prompt is served."""
        if not self.entry_bytes:
            return self.max_entries
        room = (self.config.workspace_mib << 20) // (self.num_layers * self.entry_bytes)
        return max(1, min(room, self.max_entries))

    @property
    def planner(self) -> BlockPlanner:
        assert self.num_layers, "plans are made from the spec of a group"
        assert self.block_size % self.kernel_block_size == 0, "whole kernel blocks"
        return BlockPlanner(
            self.config,
            self.kernel_block_size,
            self.num_layers,
            self.model_kv_heads,
            self.block_size // self.kernel_block_size,
        )

    @classmethod
    def merge(cls, specs):
        """Merge equal configs; vLLM's own merge builds the result from its own fields only."""
        # vLLM tries to merge any layers and takes an AssertionError for a no
        assert all(isinstance(spec, cls) for spec in specs), "compressed with uncompressed layers"
        extra = {
            f.name: getattr(specs[0], f.name)
            for f in dataclasses.fields(cls)
            if f.name not in {g.name for g in dataclasses.fields(FullAttentionSpec)}
        }
        assert all(getattr(spec, name) == value for spec in specs for name, value in extra.items())
        base = FullAttentionSpec.merge([spec.base_spec() for spec in specs])
        return cls.of(base, **{**extra, "num_layers": len(specs)})

    @classmethod
    def of(cls, spec: FullAttentionSpec, **extra) -> "CompressedSpec":
        """``spec`` with our fields added."""
        fields = {
            f.name: getattr(spec, f.name) for f in dataclasses.fields(FullAttentionSpec) if f.init
        }
        return cls(**fields, **extra)

    def base_spec(self) -> FullAttentionSpec:
        """vLLM's own spec of the layer."""
        fields = dataclasses.fields(FullAttentionSpec)
        return FullAttentionSpec(**{f.name: getattr(self, f.name) for f in fields if f.init})


@dataclass
class TrackedRequest:
    """What the manager knows of a request that asked for blocks.

    Attributes:
        request: vLLM's.
        settings: what it has chosen.
        plan: of its prompt.
        compressed: its blocks have been freed, and the workers were told to compress it.
        holds_entry: the workers keep what its prompt leaves behind until it is compressed.
    """

    request: Request
    settings: RequestSettings
    plan: PromptPlan
    compressed: bool = False
    holds_entry: bool = False

    @property
    def when(self) -> When:
        """The policy for its prompt."""
        return self.settings.config.when

    @property
    def is_prefilled(self) -> bool:
        """Every prompt token has been computed, or will have been when the next step begins."""
        return self.request.num_computed_tokens >= self.request.num_prompt_tokens


class CompressedManager(FullAttentionManager):
    """Frees the blocks of compressed prompts; keeps private ones out of the prefix cache.

    Attributes:
        tracked: by request id, until a request's blocks are freed.
        free_entries: how many more requests the workers can keep something for.
        telemetry: counts what it does; the scheduler's.
    """

    telemetry: SchedulerTelemetry

    def __init__(self, kv_cache_spec: CompressedSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.planner = kv_cache_spec.planner
        self.tracked: dict[str, TrackedRequest] = {}
        self.free_entries = kv_cache_spec.num_entries

    def track(self, request: Request) -> TrackedRequest:
        """What is known of the request, from now on until its blocks are freed."""
        found = self.tracked.get(request.request_id)
        if found is None:
            settings = self._settings(request)
            facts = prompt_facts(request.num_prompt_tokens, request.mm_features)
            plan = self.planner.with_config(settings.config).plan(facts)
            found = self.tracked[request.request_id] = TrackedRequest(request, settings, plan)
        return found

    def _settings(self, request: Request) -> RequestSettings:
        """Checked before the request came here, see ``request_checks``."""
        params = request.sampling_params
        return self.choices.settings(None if params is None else params.extra_args)

    @property
    def choices(self) -> Choices:
        """What requests may choose."""
        return Choices.of(self.planner.config, self.planner.block_size)

    def configure(self, planner: BlockPlanner) -> None:
        """Plan by this planner's configuration, and by what requests may choose beside it.

        No request may be running.
        """
        self.planner = planner
        self.telemetry.configure(self.choices)

    def take_entry(self, request: TrackedRequest) -> bool:
        """Let the workers keep what this prompt leaves behind; False when they have no room."""
        if not request.holds_entry and self.free_entries > 0:
            request.holds_entry = True
            self.free_entries -= 1
        return request.holds_entry

    def compress(self, tracked: TrackedRequest, outcome: Outcome) -> CompressionOrder:
        """Free what precedes the kept blocks; the order tells the workers to compact the prompt.

        The blocks may be handed out in the step that carries the order: workers compact before its
        forward pass, and the steps in flight are ahead of it.
        """
        req_id, plan = tracked.request.request_id, tracked.plan
        blocks = self.req_to_blocks[req_id]
        num_blocks = -(-tracked.request.num_prompt_tokens // self.planner.block_size)
        parts = range(self.planner.pool_block)
        block_ids = [block.block_id * len(parts) + part for block in blocks for part in parts]
        order = CompressionOrder(req_id, plan, block_ids[:num_blocks])
        held = sum(not block.is_null for block in blocks)
        before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(req_id, 0, plan.num_freed_blocks)
        freed = self.block_pool.get_num_free_blocks() - before
        label = tracked.settings.label
        self.telemetry.record(label, outcome, held, held - plan.num_freed_blocks, freed)
        tracked.compressed = True
        self._release_entry(tracked)
        return order

    def share_of_blocks(self, tracked: TrackedRequest) -> float:
        """Blocks that compressing the prompt gives up, each divided by those that share it.

        A block comes back when the last of them is compressed, so every one has its part in that.
        """
        blocks = self.req_to_blocks[tracked.request.request_id]
        return sum(1 / block.ref_cnt for block in blocks[: tracked.plan.num_freed_blocks])

    def count_whole(self, tracked: TrackedRequest) -> None:
        """A prompt has ended that fits its budget."""
        self.telemetry.record_whole(tracked.settings.label)

    def report(self, tracked: TrackedRequest) -> dict[str, str | int]:
        """What has become of a request, for whoever sent it."""
        plan = tracked.plan
        outcome, kept = "kept_whole", plan.facts.length
        if tracked.compressed:
            outcome, kept = "compressed", self.planner.kept_tokens(plan)
        elif plan.compresses:
            outcome = "not_compressed"
        return {
            "method": tracked.settings.label,
            "outcome": outcome,
            "prompt_tokens": plan.facts.length,
            "kept_tokens": kept,
        }

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        tracked = self.tracked.pop(request_id, None)
        if tracked is not None:
            self._release_entry(tracked)
        return super().pop_blocks_for_free(request_id)

    def return_entry(self, tracked: TrackedRequest) -> None:
        """A request that got no blocks keeps no entry, which one that has blocks may need."""
        if not self.req_to_blocks.get(tracked.request.request_id):
            self._release_entry(tracked)

    def _release_entry(self, tracked: TrackedRequest) -> None:
        self.free_entries += tracked.holds_entry
        tracked.holds_entry = False

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        plan = self.track(request).plan
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
    widths: list[int] = []
    for feature in features:
        if feature.modality in ("image", "video"):
            ranges = feature.mm_position.extract_embeds_range()
            runs = [(start, end + 1) for start, end in ranges]
            found = temporal_patches(feature, runs) if feature.modality == "video" else [runs]
            items += found
            widths += [row_width(feature, runs)] * len(found)
    return PromptFacts.from_items(length, items, widths)


def grid_of(feature: MultiModalFeatureSpec) -> list[int] | None:
    """Temporal patches, rows and columns of patches, where the processor tells them."""
    name = f"{feature.modality}_grid_thw"
    grid = feature.data.get(name) if feature.data is not None else None
    if grid and isinstance(grid.data, torch.Tensor):
        return [int(size) for size in grid.data.view(-1)[:3]]
    return None


def row_width(feature: MultiModalFeatureSpec, runs: list[Run]) -> int:
    """Visual tokens in a row of an image or of a temporal patch; 0 where that is not known.

    A square of patches makes one visual token (the Qwen-VL families merge 2 x 2).
    """
    grid, tokens = grid_of(feature), sum(end - start for start, end in runs)
    if grid is None or not tokens:
        return 0
    merged = math.isqrt(math.prod(grid) // tokens)
    if not merged or merged**2 * tokens != math.prod(grid) or grid[2] % merged:
        return 0  # some tokens were dropped
    return grid[2] // merged


def temporal_patches(feature: MultiModalFeatureSpec, runs: list[Run]) -> list[list[Run]]:
    """Runs of a video as those of its temporal patches.

    A processor that tells the grid (the Qwen-VL families) makes patches of one size. Others (such
    as InternVL) put text between frames, so that each run is one; frames side by side stay
    together.

    A scheduler may hold features without data. It counts visual tokens only, whatever their patch.
    """
    grid = grid_of(feature)
    if runs and grid is not None:
        return split_evenly(runs, grid[0])
    return [[run] for run in runs]


def manager_of(manager: KVCacheManager) -> CompressedManager | None:
    """The manager of the compressed group; None when nothing is compressed."""
    for each in manager.coordinator.single_type_managers:
        if isinstance(each, CompressedManager):
            return each
    return None


class CompressedKVCacheManager(KVCacheManager):
    """A scheduler's KV cache manager, for engines that compress.

    vLLM's scheduler builds its own; ``adopt`` gives that object this class.

    Attributes:
        compressed: the manager of the compressed group.
        relieve: compresses a prompt because this request gets no blocks; False when none is left.
    """

    compressed: CompressedManager
    relieve: Callable[[Request], bool]

    @classmethod
    def adopt(
        cls, manager: KVCacheManager, relieve: Callable[[Request], bool]
    ) -> "CompressedKVCacheManager":
        """Make ``manager``, which has a compressed group, one of ours."""
        assert type(manager) is KVCacheManager, "nobody else has changed it"
        compressed = manager_of(manager)
        assert compressed is not None
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager.compressed, manager.relieve = compressed, relieve
        return manager

    def get_computed_blocks(self, request: Request, *args, **kwargs):
        """Prefix-cache hits end before rows that a method looks at, and before the kept blocks."""
        plan = self.compressed.track(request).plan
        if not plan.compresses:
            return super().get_computed_blocks(request, *args, **kwargs)
        token = _hit_cap.set(plan.max_hit)
        try:
            blocks, num_hit, boundary = super().get_computed_blocks(request, *args, **kwargs)
        finally:
            _hit_cap.reset(token)
        if self.num_kv_cache_groups > 1:
            # hybrid models retain sliding-window blocks at such junctions only: hits end at ours
            boundary = boundary or plan.max_hit
        return blocks, num_hit, boundary

    def allocate_slots(self, request: Request, *args, **kwargs):
        """Before anybody is preempted or kept waiting for blocks, prompts are compressed."""
        blocks = super().allocate_slots(request, *args, **kwargs)
        if blocks is None and self._waits_for_state(kwargs.get("new_computed_blocks")):
            return None
        while blocks is None and self.relieve(request):
            blocks = super().allocate_slots(request, *args, **kwargs)
        return blocks

    def _waits_for_state(self, hit: KVCacheBlocks | None) -> bool:
        """The hit ends at a Mamba state that is computed in this very step: blocks do not help."""
        return hit is not None and any(
            blocks and blocks[-1].block_hash in manager.cached_blocks_this_step
            for manager, blocks in zip(
                self.coordinator.single_type_managers, hit.blocks, strict=True
            )
            if isinstance(manager, MambaManager)
        )


KVCacheSpecRegistry._ensure_registered()  # before ours: it fills an empty registry only
KVCacheSpecRegistry.register(
    CompressedSpec, CompressedManager, uniform_type_base_spec=FullAttentionSpec
)
