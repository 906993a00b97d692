# SPDX-License-Identifier: Apache-2.0
"""Builds the attention metadata of a compressing layer group, on every platform.

A request's KV head is, for decoding, a paged sequence of its own: G query heads, one KV head, its
own page table and length. So the decode rows of R requests run as a *virtual batch* of R * Hkv
sequences through the platform's own attention kernel, while prompts run as stock vLLM runs them.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils import torch_utils
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress import kernels
from vllm_kvcompress.adapter import ending_prompts, refusals
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.metadata import CompressedMetadata, RowTransfer, VirtualBatch
from vllm_kvcompress.adapter.parallel import mean_over_heads, mean_over_replicas, rank_heads
from vllm_kvcompress.adapter.runner import current_step
from vllm_kvcompress.adapter.settings import describe_budget, settings_of
from vllm_kvcompress.adapter.telemetry import WorkerTelemetry
from vllm_kvcompress.allocation import Scope
from vllm_kvcompress.batch import StepRows, head_major_order, plan_rows, ranges
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.kernels import PageLayout
from vllm_kvcompress.page_state import HeadPageState, PageTables
from vllm_kvcompress.pipeline import CompressionPipeline
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.prefill_stats import PromptSums
from vllm_kvcompress.request_store import RequestStore

logger = init_logger("vllm.kvcompress")


class CompressedBuilder:
    """Mixin of a platform's metadata builder.

    The platform class supplies ``make_virtual_builder`` (a second builder of the platform, for one
    KV head), ``page_layout``, and ``hold`` where steps are replayed from full graphs.
    """

    platform_backend: ClassVar[str]
    supports_update_block_table = False
    block_size: int
    device: torch.device
    layer_names: list[str]

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        settings = settings_of(vllm_config)
        if not isinstance(kv_cache_spec, CompressedSpec) or settings is None:
            raise KVCompressionError(
                "KV compression was asked for, but vLLM gives these layers a cache that cannot be "
                f"compressed ({type(kv_cache_spec).__name__}): serve the model without "
                "--kv-compression."
            )
        names = sorted(layer_names, key=extract_layer_index)
        self.layer_rows = {name: row for row, name in enumerate(names)}
        self.layer_indices = {name: extract_layer_index(name) for name in names}
        self.last_layer = names[-1]
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.max_num_rows = vllm_config.scheduler_config.max_num_seqs
        self.max_num_blocks = -(-vllm_config.model_config.max_model_len // self.block_size)
        parallel = vllm_config.parallel_config
        model_heads, ranks = kv_cache_spec.model_kv_heads, parallel.tensor_parallel_size
        self.heads = rank_heads(model_heads, self.num_kv_heads, ranks)
        self.mean_over_replicas = mean_over_replicas(model_heads, ranks)
        self.layers = [vllm_config.compilation_config.static_forward_context[n] for n in names]
        refusals.check_scales(self.layers)
        self._span: tuple[torch.Tensor, int] | None = None
        self.telemetry = WorkerTelemetry(device, active=parallel.rank == 0)
        self.virtual_builder = self.make_virtual_builder(
            replace(kv_cache_spec.plain(), num_kv_heads=1), vllm_config
        )
        self.arange = torch.arange(self.max_num_rows * self.num_kv_heads + 1, dtype=torch.int32)
        self.configure(settings, kv_cache_spec.planner)
        self._announce(vllm_config)

    def configure(self, settings: KVCompressionConfig, planner: BlockPlanner) -> None:
        """Use these settings from now on; no request may be running."""
        self.settings, self.planner = settings, planner
        num_layers = len(self.layer_rows)
        assert planner.num_layers == num_layers, "plans count the layers of the group"
        allocator = settings.allocation
        self.even = allocator.scope is Scope.EVEN
        self.state = HeadPageState(
            self.max_num_rows, 1 if self.even else num_layers, self.num_kv_heads, self.device
        )
        self.tables = PageTables(self.state, self.max_num_blocks, self.block_size)
        self.pipeline = CompressionPipeline(
            settings.scoring,
            allocator,
            settings.merging,
            settings.window,
            num_layers,
            self.num_kv_heads,
            self.page_layout(),
            self.state,
            mean_over_heads,
            int(self.heads[0]),
            self.mean_over_replicas,
        )
        self.stored_rows = RequestStore()
        self.sums = PromptSums(num_layers, settings.needs)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Full graphs hold decode steps only: they are captured as virtual batches."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def make_virtual_builder(self, spec: FullAttentionSpec, vllm_config) -> Any:
        raise NotImplementedError

    def page_layout(self) -> PageLayout:
        raise NotImplementedError

    def hold(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of a decode step as graphs will read it; without graphs the tensor itself.

        ``name`` is "slots" or "starts".
        """
        return value

    def _announce(self, vllm_config) -> None:
        runner = "V2" if vllm_config.use_v2_model_runner else "V1"
        logger.info_once(
            "KV compression is on: scorer %s, allocator %s, merge %s, budget %s per KV head, "
            "window %d, block size %d, %d layers x %d KV heads, backend %s on %s, model runner %s, "
            "kernels: %s. Refused: %s.",
            self.settings.scorer,
            self.settings.allocator,
            self.settings.merge,
            describe_budget(self.settings),
            self.settings.window,
            self.block_size,
            len(self.layer_rows),
            self.num_kv_heads,
            self.platform_backend,
            self.device,
            runner,
            kernels.describe(self.device.type),
            refusals.SUMMARY,
        )

    def upload(self, values: np.ndarray) -> torch.Tensor:
        """Start copying a host array to the device."""
        if self.device.type == "cpu":
            return torch.from_numpy(values)
        return torch_utils.async_tensor_h2d(values, device=self.device)

    def build_for_cudagraph_capture(self, cam: CommonAttentionMetadata):
        nobody = np.full(cam.num_reqs, self.state.num_slots, dtype=np.int64)
        return CompressedMetadata(
            self, cam.num_actual_tokens, virtual=self._decode_batch(cam, nobody)
        )

    def build(self, common_prefix_len: int, cam: CommonAttentionMetadata, fast_build: bool = False):
        step = current_step()
        if step is None:  # dummy runs have no requests
            return super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
        self.telemetry.poll()
        self._forget(step.state.slots.take_left())
        rows = step.rows(cam)
        self._begin_requests(rows)
        decode, prompt = rows.decode_part, rows.prompt_part
        if not prompt.any() and cam.max_query_len == 1:
            slots = np.full(cam.num_reqs, self.state.num_slots, dtype=np.int64)
            slots[: len(rows.slots)] = rows.slots
            return CompressedMetadata(
                self, cam.num_actual_tokens, virtual=self._decode_batch(cam, slots)
            )
        meta = CompressedMetadata(self, cam.num_actual_tokens)
        if not decode.any():
            meta.natural = super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
        elif prompt.any():
            self._natural_part(meta, cam, rows)
        self._compression_part(meta, cam, rows)
        if decode.any():
            meta.virtual = self._mixed_batch(cam, rows)
        return meta

    def _begin_requests(self, rows: StepRows) -> None:
        """Give the state of new requests, and of prompts that end now, its starting value."""
        ends, compresses = rows.ends_prompt, rows.compresses
        lost = compresses & rows.fresh & (rows.num_computed >= rows.prompt_lens)
        assert not lost.any(), "a request came past its prompt without having been compressed"
        begin = np.flatnonzero(rows.fresh | ends)
        if begin.size == 0:
            return
        done = (compresses & ends)[begin]
        num_full = [plan.num_full_blocks for plan in (rows.plans[i] for i in begin)]
        num_kept = [plan.num_kept_blocks for plan in (rows.plans[i] for i in begin)]
        packed = self.upload(
            np.stack([rows.slots[begin], np.where(done, num_full, 0), np.where(done, num_kept, 1)])
        )
        self.state.begin(packed[0], packed[1], packed[2], self.even)

    def _natural_part(
        self, meta: CompressedMetadata, cam: CommonAttentionMetadata, rows: StepRows
    ) -> None:
        """The platform's metadata for the prompt tokens of a mixed batch."""
        part = rows.prompt_part
        chosen = np.flatnonzero(part)
        lens = part[chosen]
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        seq_lens = (rows.num_computed[chosen] + lens).astype(np.int32)
        index = self.upload(chosen)
        meta.natural_tokens = self.upload(ranges(rows.query_starts[chosen], lens))
        host_lens = torch.from_numpy(seq_lens)
        sub = replace(
            cam,
            query_start_loc=self.upload(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self.upload(seq_lens),
            seq_lens_cpu_upper_bound=host_lens,
            num_reqs=len(chosen),
            num_actual_tokens=int(lens.sum()),
            max_query_len=int(lens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=cam.block_table_tensor[index],
            is_prefilling=None,
            req_idx=None,
        )
        meta.natural = super().build(0, sub)  # type: ignore[misc]

    def _compression_part(
        self, meta: CompressedMetadata, cam: CommonAttentionMetadata, rows: StepRows
    ) -> None:
        """What ends in this step, and the rows that it brings or still misses."""
        ends = rows.ends_prompt
        ending = np.flatnonzero(ends & rows.compresses)
        self.telemetry.record_prompts(
            len(ending), int(ends.sum()) - len(ending), int(rows.prompt_lens[ending].sum())
        )
        moved = plan_rows(rows, ending)
        load = save = tokens = None
        if moved.load[0].size:
            entry, column, owner, store_row = moved.load
            request = self.stored_rows.rows([rows.req_ids[i] for i in owner])
            load = tuple(self.upload(a) for a in (entry, column, request, store_row))
        if moved.save[0].size:
            owner, store_row, token = moved.save
            request = self.stored_rows.rows([rows.req_ids[i] for i in owner])
            save = tuple(self.upload(a) for a in (request, store_row, token))
        if self.sums:
            meta.sums = ending_prompts.sum_rows(self, cam, rows, ending)
        if ending.size:
            tokens = self.upload(moved.tokens)
            meta.ending = ending_prompts.gather(self, cam, rows, ending)
            meta.tail_tokens = sum(rows.plans[i].tail for i in ending)
            self._forget([rows.req_ids[i] for i in ending])
        if ending.size or save:
            meta.queries = RowTransfer(tokens, load, save)

    def _forget(self, req_ids: Iterable[str]) -> None:
        """These requests need nothing of earlier chunks any more."""
        gone = list(req_ids)
        self.stored_rows.discard(gone)
        self.sums.discard(gone)

    def stored_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """[requests, L, rows, Hq, D] of earlier chunks."""
        shape = (len(self.layer_rows), self.planner.max_rows, *queries.shape[-2:])
        return self.stored_rows.reserve(shape, queries.dtype, queries.device)

    def span(self) -> tuple[torch.Tensor | None, int]:
        """Head pages of all layers and the pages from one layer to the next.

        None and 0 when no page moves between layers.
        """
        if not self.pipeline.spans_layers:
            return None, 0
        caches = [layer.kv_cache for layer in self.layers]
        first = caches[0]
        if self._span is None or self._span[0].data_ptr() != first.data_ptr():
            elems = first.shape[2] * first.shape[3]
            offsets = [cache.storage_offset() - first.storage_offset() for cache in caches]
            step = offsets[1] if len(offsets) > 1 else 0
            storages = {cache.untyped_storage().data_ptr() for cache in caches}
            regular = offsets == [row * step for row in range(len(offsets))]
            if len(storages) > 1 or not regular or step % elems:
                raise KVCompressionError(
                    f"the allocator {self.settings.allocator} moves budget between layers, but "
                    "vLLM does not place the layers of this model at equal distances: use an "
                    "allocator that stays inside a layer, such as uniform or adakv."
                )
            count = (offsets[-1] + first.numel()) // elems
            pages = torch.as_strided(first, (count, elems), (elems, 1), first.storage_offset())
            self._span = pages, step // elems
        return self._span

    def _decode_batch(self, cam: CommonAttentionMetadata, slots: np.ndarray) -> VirtualBatch:
        """All rows decode one token: query memory already is in virtual order.

        Padding rows of a full graph have no query token, like vLLM's own.
        """
        num_rows, num_heads = cam.num_reqs, self.num_kv_heads
        num_queries = int(cam.query_start_loc_cpu[num_rows]) * num_heads
        starts = self.arange[: num_rows * num_heads + 1].clamp(max=num_queries)
        virtual_cam = self._virtual_cam(cam, starts, num_rows, cam.num_actual_tokens, 1)
        virtual_cam.query_start_loc = self.hold("starts", virtual_cam.query_start_loc)
        virtual = VirtualBatch(
            slots=self.hold("slots", self.upload(slots)),
            seq_lens=cam.seq_lens[:num_rows],
            block_table=cam.block_table_tensor[:num_rows],
            order=None,
            cam=virtual_cam,
            layers_at_once=self.tables.layers_at_once(num_rows),
        )
        return self._share_table(virtual)

    def _mixed_batch(self, cam: CommonAttentionMetadata, rows: StepRows) -> VirtualBatch:
        """Decode parts of a step that also has prompt parts, or has rows of several tokens."""
        part = rows.decode_part
        chosen = np.flatnonzero(part)
        lens = part[chosen]
        first = rows.query_starts[chosen] + rows.query_lens[chosen] - lens
        starts = np.concatenate([[0], np.cumsum(np.repeat(lens, self.num_kv_heads))])
        index = self.upload(chosen)
        layers_at_once = self.tables.layers_at_once(len(chosen))
        if rows.ends_prompt[chosen].any():  # their pages are not known before their layer has run
            layers_at_once = 1
        virtual = VirtualBatch(
            slots=self.upload(rows.slots[chosen]),
            seq_lens=cam.seq_lens[index],
            block_table=cam.block_table_tensor[index],
            order=self.upload(head_major_order(first, lens, self.num_kv_heads)),
            cam=self._virtual_cam(
                cam,
                torch.from_numpy(starts.astype(np.int32)),
                len(chosen),
                int(lens.sum()),
                int(lens.max()),
            ),
            layers_at_once=layers_at_once,
        )
        return self._share_table(virtual)

    def _virtual_cam(
        self,
        cam: CommonAttentionMetadata,
        starts: torch.Tensor,
        num_rows: int,
        num_tokens: int,
        max_query_len: int,
    ) -> CommonAttentionMetadata:
        return replace(
            cam,
            query_start_loc=self.upload(starts.numpy()),
            query_start_loc_cpu=starts,
            num_reqs=num_rows * self.num_kv_heads,
            num_actual_tokens=num_tokens * self.num_kv_heads,
            max_query_len=max_query_len,
            seq_lens_cpu_upper_bound=None,
            is_prefilling=None,
            req_idx=None,
        )

    def _share_table(self, virtual: VirtualBatch) -> VirtualBatch:
        """Layers that are all alike share one table, built here instead of in a layer."""
        if self.even:
            self._fill_tables(virtual, 0)
        return virtual

    def _fill_tables(self, virtual: VirtualBatch, layer_row: int) -> None:
        """Make the tables of as many layers as go together, from this one on."""
        num_layers = min(virtual.layers_at_once, self.tables.num_layers - layer_row)
        rows = virtual.slots, virtual.block_table, virtual.seq_lens
        tables = self.tables.fill(*rows, layer_row, num_layers, self.span()[1])
        virtual.prepared = [
            self.virtual_builder.build(
                0,
                replace(virtual.cam, block_table_tensor=table, seq_lens=kv_len),
                fast_build=not self.even,
            )
            for table, kv_len in zip(*tables, strict=True)
        ]

    def virtual_metadata(self, virtual: VirtualBatch, layer_row: int) -> Any:
        """The platform's metadata of one layer's virtual batch; layers ask in their order."""
        if self.even:
            return virtual.prepared[0]
        index = layer_row % virtual.layers_at_once
        if index == 0:  # also where tables were made before: a graph has to see it again
            self._fill_tables(virtual, layer_row)
        return virtual.prepared[index]
