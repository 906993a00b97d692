# SPDX-License-Identifier: Apache-2.0
"""Builds the attention metadata of a compressing layer group, on every platform.

A request's KV head is, for decoding, a paged sequence of its own: G query heads, one KV head, its
own page table and length. So the decode rows of R requests run as a *virtual batch* of R * Hkv
sequences through the platform's own attention kernel, while prompts run as stock vLLM runs them.
"""

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
from vllm_kvcompress.adapter import refusals
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.metadata import CompressedMetadata, VirtualBatch, WindowTransfer
from vllm_kvcompress.adapter.runner import current_step
from vllm_kvcompress.adapter.settings import settings_of
from vllm_kvcompress.adapter.telemetry import WorkerTelemetry
from vllm_kvcompress.batch import StepRows, head_major_order, plan_windows, ranges
from vllm_kvcompress.config import Budget, KVCompressionConfig, KVCompressionError
from vllm_kvcompress.kernels import PageLayout
from vllm_kvcompress.pipeline import CompressionPipeline, EndingPrompts, HeadPageState
from vllm_kvcompress.window_store import WindowStore

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
        self.settings: KVCompressionConfig = settings
        names = sorted(layer_names, key=extract_layer_index)
        self.layer_rows = {name: row for row, name in enumerate(names)}
        self.layer_indices = {name: extract_layer_index(name) for name in names}
        self.last_layer = names[-1]
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.max_num_rows = vllm_config.scheduler_config.max_num_seqs
        allocator = settings.make_allocator()
        self.even = allocator.even
        self.state = HeadPageState(
            self.max_num_rows, 1 if self.even else len(names), self.num_kv_heads, device
        )
        self.pipeline = CompressionPipeline(
            settings.make_scorer(), allocator, settings.window, self.page_layout(), self.state
        )
        self.window_store = WindowStore(len(names), settings.window)
        rank = vllm_config.parallel_config.rank
        self.telemetry = WorkerTelemetry(device, active=rank == 0)
        self.virtual_builder = self.make_virtual_builder(
            replace(kv_cache_spec.plain(), num_kv_heads=1), vllm_config
        )
        self.arange = torch.arange(self.max_num_rows * self.num_kv_heads + 1, dtype=torch.int32)
        self._announce(vllm_config)

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

        ``name`` is "slots", "starts", "table" or "kv_len".
        """
        return value

    def _announce(self, vllm_config) -> None:
        runner = "V2" if vllm_config.use_v2_model_runner else "V1"
        logger.info_once(
            "KV compression is on: scorer %s, allocator %s, budget %s per KV head, "
            "window %d, block size %d, %d layers x %d KV heads, backend %s on %s, model runner %s, "
            "kernels: %s. Refused: %s.",
            self.settings.scorer,
            self.settings.allocator,
            describe_budget(self.settings.budget),
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
        self.window_store.discard(step.state.slots.take_left())
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
        """What ends in this step, and the window queries that it brings or still misses."""
        ends = rows.ends_prompt
        ending = np.flatnonzero(ends & rows.compresses)
        self.telemetry.record_prompts(
            len(ending), int(ends.sum()) - len(ending), int(rows.prompt_lens[ending].sum())
        )
        windows = plan_windows(rows, ending, self.settings.window)
        load = save = tokens = None
        if windows.load[0].size:
            entry, window_row, owner = windows.load
            store = self.window_store.rows([rows.req_ids[i] for i in owner])
            load = tuple(self.upload(a) for a in (entry, window_row, store))
        if windows.save[0].size:
            owner, window_row, token = windows.save
            store = self.window_store.rows([rows.req_ids[i] for i in owner])
            save = tuple(self.upload(a) for a in (store, window_row, token))
        if ending.size:
            tokens = self.upload(windows.tokens)
            meta.ending = self._ending_prompts(cam, rows, ending)
            meta.tail_tokens = sum(rows.plans[i].tail for i in ending)
            self.window_store.discard(rows.req_ids[i] for i in ending)
        if ending.size or save:
            meta.windows = WindowTransfer(tokens, load, save)

    def _ending_prompts(
        self, cam: CommonAttentionMetadata, rows: StepRows, ending: np.ndarray
    ) -> EndingPrompts:
        plans = [rows.plans[i] for i in ending]
        facts = np.array(
            [
                rows.slots[ending],
                rows.prompt_lens[ending],
                [plan.budget - self.settings.window for plan in plans],
                [plan.num_full_blocks for plan in plans],
                [plan.num_kept_blocks for plan in plans],
                [plan.tail for plan in plans],
                ending,
            ],
            dtype=np.int64,
        )
        slots, prompt_lens, capacity, num_full, num_kept, tail, index = self.upload(facts)
        num_blocks = -(-int(rows.prompt_lens[ending].max()) // self.block_size)
        pages = (plan.num_kept_blocks * (1 if self.even else self.num_kv_heads) for plan in plans)
        return EndingPrompts(
            slots=slots,
            prompt_lens=prompt_lens,
            capacity=capacity,
            num_full_blocks=num_full,
            num_kept_blocks=num_kept,
            tail=tail,
            block_table=cam.block_table_tensor[index, :num_blocks].long(),
            max_pages=max(
                min(p, plan.num_full_blocks) for p, plan in zip(pages, plans, strict=True)
            ),
        )

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
            width=self._table_width(cam),
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
            width=self._table_width(cam),
        )
        return self._share_table(virtual)

    def _table_width(self, cam: CommonAttentionMetadata) -> int:
        return min(cam.block_table_tensor.shape[1], -(-cam.max_seq_len // self.block_size))

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
        """Layers that are all alike share one table, built here instead of in every layer."""
        if self.even:
            virtual.prepared = self.virtual_metadata(virtual, 0)
        return virtual

    def virtual_metadata(self, virtual: VirtualBatch, layer_row: int) -> Any:
        """The platform's metadata of one layer's virtual batch."""
        if virtual.prepared is not None:
            return virtual.prepared
        table, kv_len = self.state.tables(
            layer_row,
            virtual.slots,
            virtual.block_table,
            virtual.seq_lens,
            self.block_size,
            virtual.width,
        )
        if self.even and virtual.order is None:
            table, kv_len = self.hold("table", table), self.hold("kv_len", kv_len)
        cam = replace(virtual.cam, block_table_tensor=table, seq_lens=kv_len)
        return self.virtual_builder.build(0, cam, fast_build=not self.even)


def describe_budget(budget: Budget) -> str:
    return f"{budget} of the prompt" if budget.tokens is None else f"{budget} tokens"
