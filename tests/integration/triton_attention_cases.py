# SPDX-License-Identifier: Apache-2.0
"""Run by test_runner_v2.py: vLLM's Triton attention, in Triton's interpreter, in float32.

vLLM's CPU platform has one backend; here it names the one for GPUs. Its kernel has two forms: one
program per sequence, and several, whose parts a second kernel adds up.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from engine import (
    Method,
    Stepper,
    assert_clean,
    assert_same,
    engine,
    free_blocks,
    generate,
    greedy,
    model_runner,
    random_prompt,
)
from every_method import reconfigure
from float_noise import measured_tolerance
from oracle import Oracle, OracleConfig
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.adapter.triton_attn import CompressedTritonBuilder, CompressedTritonImpl

PROMPTS = [random_prompt(length, seed=91) for length in (60, 3)]
PARAMS = [greedy(4), greedy(3)]
METHODS = {
    "uniform": {"method": "snapkv", "budget": 32, "window": 16},
    "ragged": {"method": "bacon+adakv", "budget": 40, "window": 16, "alpha": 0.0, "mode": "rel"},
}
by_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    return checkpoint("llama", layers=1)


@pytest.fixture(scope="module")
def tolerance(model) -> float:
    """Between stock vLLM, with its attention for CPUs, and Transformers."""
    return measured_tolerance(model, PROMPTS, max_model_len=128)


@pytest.fixture(scope="module")
def llm(model, tolerance):
    with pytest.MonkeyPatch.context() as patch:
        path = AttentionBackendEnum.TRITON_ATTN.get_path()
        patch.setattr(CpuPlatform, "get_attn_backend_cls", lambda *args, **kwargs: path)
        # the kernel that writes the cache chooses its tiles by it
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        # starts with what needs most room
        with engine(
            model,
            Method("bacon+adakv", 40, 16, (("alpha", 0.0), ("mode", "rel"))),
            block_size=16,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=64,
        ) as llm:
            yield llm


@pytest.fixture
def builder(llm) -> CompressedTritonBuilder:
    ((group,),) = model_runner(llm).attn_groups
    builder = group.get_metadata_builder()
    assert isinstance(builder, CompressedTritonBuilder)
    return builder


@functools.cache
def expected(model: str, name: str) -> list:
    raw = METHODS[name]
    scorer, _, allocator = raw["method"].partition("+")
    options = {key: raw[key] for key in ("alpha", "mode") if key in raw}
    config = OracleConfig(
        budget=raw["budget"],
        scorer=scorer,
        allocator=allocator or "uniform",
        window=16,
        block_size=16,
        **options,
    )
    oracle = Oracle(model)
    return [
        oracle.generate(prompt, params.max_tokens, config)
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


@by_method
def test_one_program_per_sequence(llm, model, name, builder, tolerance, monkeypatch):
    """As with more sequences than the threshold; compressed requests beside others."""
    reconfigure(llm, METHODS[name])
    monkeypatch.setattr(builder.per_head_builder, "seq_threshold_3D", 0)
    free = free_blocks(llm)
    assert_same(generate(llm, PROMPTS, PARAMS), expected(model, name), tolerance)
    Stepper(llm).flush()
    assert_clean(llm, free)


@by_method
def test_several_programs_in_full_graphs(llm, model, name, builder, tolerance, monkeypatch):
    """Decode steps are per-head batches, whoever is compressed, of tensors at fixed addresses."""
    reconfigure(llm, METHODS[name])
    seen = []
    original = builder._decode_batch

    def decode_batch(cam, slots, max_seq_len, query_len):
        batch = original(cam, slots, max_seq_len, query_len)
        meta = batch.metadata_of(0)
        tensors = (meta.query_start_loc, meta.seq_lens, meta.block_table, meta.softmax_segm_output)
        seen.append((cam.num_reqs, *(tensor.data_ptr() for tensor in tensors)))
        return batch

    monkeypatch.setattr(builder, "replays_graphs", True)
    monkeypatch.setattr(builder, "_decode_batch", decode_batch)
    assert_same(generate(llm, PROMPTS, PARAMS), expected(model, name), tolerance)
    together = [addresses for addresses in seen if addresses[0] == len(PROMPTS)]
    assert len(together) > 1
    assert len(set(together)) == 1


def test_a_graph_is_captured_over_short_sequences(llm, builder):
    """vLLM captures with the longest sequences, which its own Triton builder cuts short."""
    starts = torch.arange(3, dtype=torch.int32)
    cam = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.full((2,), 128, dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=128,
        block_table_tensor=torch.zeros(2, 8, dtype=torch.int32),
        slot_mapping=torch.zeros(2, dtype=torch.int64),
    )
    meta = builder.build_for_cudagraph_capture(cam).per_head.metadata_of(0)
    assert meta.seq_lens.tolist() == [1] * 2 * builder.num_kv_heads


def test_what_vllm_must_not_do(builder):
    """Its own classes say yes to these: here parts of a batch are put together before they are
    quantized, and tables and lengths are made anew for each step.
    """
    impl = builder.layers.facts.modules[0].impl
    assert TritonAttentionImpl.fused_output_quant_supported(impl, kFp8StaticTensorSym)
    assert builder.per_head_builder.supports_draft_decode_metadata_update
    assert not builder.supports_draft_decode_metadata_update
    assert not impl.fused_output_quant_supported(kFp8StaticTensorSym)
    assert not impl.fused_rope_kvcache_supported()


@pytest.mark.parametrize(
    ("block_size", "head_size", "group", "softcap"), [(16, 64, 4, 0.0), (32, 512, 3, 5.0)]
)
@pytest.mark.parametrize(
    ("query_lens", "threshold"),
    [([1] * 4, 128), ([1] * 4, 0), ([1, 4, 2, 3], 128)],
    ids=["several programs", "one program", "several queries"],
)
def test_sequences_of_one_head(llm, block_size, head_size, group, softcap, query_lens, threshold):
    """Heads of unlike lengths, with pages of anywhere, against attention written out."""
    generator = torch.Generator().manual_seed(head_size + len(set(query_lens)))
    config = llm.llm_engine.vllm_config
    num_seqs, num_pages, width = len(query_lens), 20, 3
    lens = torch.tensor([3 * block_size, 5, 2 * block_size + 1, 4])
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=head_size, dtype=torch.float32
    )
    layer_group = SimpleNamespace(num_heads_q=2 * group, num_kv_heads=2, device="cpu")
    builder = CompressedTritonBuilder.make_per_head_builder(layer_group, spec, config)
    assert (builder.num_heads_q, builder.num_heads_kv, builder.headdim) == (group, 1, head_size)
    assert builder.seq_threshold_3D == 128
    assert builder.softmax_segm_output.shape == (128, group, 16, head_size)
    builder.seq_threshold_3D = threshold
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    pages = torch.randn(num_pages, 1, block_size, 2 * head_size, generator=generator)
    table = torch.randint(num_pages, (num_seqs, width), generator=generator, dtype=torch.int32)
    queries = torch.randn(int(starts[-1]), group, head_size, generator=generator)
    meta = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens.int(),
            num_reqs=num_seqs,
            num_actual_tokens=len(queries),
            max_query_len=max(query_lens),
            max_seq_len=int(lens.max()),
            block_table_tensor=table,
            slot_mapping=torch.zeros(len(queries), dtype=torch.int64),
        ),
    )
    with set_current_vllm_config(config):
        impl = CompressedTritonImpl(
            group, head_size, head_size**-0.5, 1, None, None, "auto", logits_soft_cap=softcap
        )
    one = torch.ones(1)
    layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
    out = torch.empty_like(queries)
    impl.forward(layer, queries, None, None, pages, meta, out)

    wanted = torch.empty_like(out)
    for seq, length in enumerate(lens.tolist()):
        held = pages[table[seq].long(), 0].flatten(0, 1)[:length].double()
        keys, values = held.split(head_size, dim=1)
        rows = slice(int(starts[seq]), int(starts[seq + 1]))
        logits = torch.einsum("thd,sd->hts", queries[rows].double(), keys) * head_size**-0.5
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        first = length - query_lens[seq]
        future = torch.arange(length) > first + torch.arange(query_lens[seq])[:, None]
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)
        wanted[rows] = torch.einsum("hts,sd->thd", weights, values).float()
    # sums of as many products as a logit and an output have, in float32
    bound = (head_size + int(lens.max())) * torch.finfo(torch.float32).eps
    assert (out - wanted).abs().max() <= bound * pages.abs().max() * queries.abs().max()
