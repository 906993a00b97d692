# SPDX-License-Identifier: Apache-2.0
"""The tensor operations of compression (installed as ``vllm_kvcompress.kernels``).

Layouts and terms:

    row         one (layer, prompt) pair: row l * N + n is layer l of prompt n; R = L * N rows
    head page   block_size tokens of one KV head; page id = block * Hkv + head inside one layer
    block_table [R, B] block ids of each row, shifted by its layer
    T           positions 0 .. T-1 of the longest prompt of a batch, rounded up to blocks

Every operation is defined in ``reference.py`` and its parts. Below is the table of all of them:
definition, Triton module for GPUs, C++ for CPUs. They are called like their definitions.
"""

from vllm_kvcompress.kernels import native, reference, reference_decode, reference_paged
from vllm_kvcompress.kernels.operations import Operation, describe, missing_on
from vllm_kvcompress.kernels.reference import Grids, PageLayout, PromptPages, as_bytes, as_stored
from vllm_kvcompress.kernels.reference_decode import HeldPages

window_scores = Operation(
    reference_paged.window_scores, triton="window_attention", cpp=native.window_scores
)
key_attention_sum = Operation(
    reference_paged.key_attention_sum, triton="column_attention", cpp=native.key_attention_sum
)
group_attention_sum = Operation(
    reference_paged.group_attention_sum, triton="proxy_attention", cpp=native.group_attention_sum
)
cover_votes = Operation(reference.cover_votes, triton="votes", cpp=native.cover_votes)
last_row_logits = Operation(
    reference_paged.last_row_logits, triton="elite_rows", cpp=native.last_row_logits
)
elite_attention = Operation(
    reference_paged.elite_attention, triton="elite_rows", cpp=native.elite_attention
)
strong_key_counts = Operation(
    reference_paged.strong_key_counts, triton="strong_keys", cpp=native.strong_key_counts
)
strength_and_skewness = Operation(reference.strength_and_skewness, triton="skewness")
gaussian_logits = Operation(
    reference_paged.gaussian_logits, cpp=native.gaussian_logits, torch_on_gpu=True
)
output_norms = Operation(
    reference_paged.output_norms, triton="value_norms", cpp=native.output_norms
)
grid_balance = Operation(reference.grid_balance, triton="grid_scores", cpp=native.grid_balance)
weigh_scores = Operation(reference.weigh_scores, triton="grid_scores", cpp=native.weigh_scores)
pool_prefix = Operation(reference.pool_prefix, triton="calibration", cpp=native.pool_prefix)
bacon_evidence = Operation(
    reference.bacon_evidence, triton="calibration", cpp=native.bacon_evidence
)
bacon_calibrate = Operation(
    reference.bacon_calibrate, triton="calibration", cpp=native.bacon_calibrate
)
apportion = Operation(reference.apportion, triton="budgets", cpp=native.apportion)
head_counts = Operation(reference.head_counts, triton="head_budgets", cpp=native.head_counts)
select_tokens = Operation(reference.select_tokens, triton="selection", cpp=native.select_tokens)
read_prompt = reference_paged.read_prompt
stage_tokens = Operation(reference.stage_tokens, triton="compaction", cpp=native.stage_tokens)
write_pages = Operation(reference.write_pages, triton="compaction", cpp=native.write_pages)
head_page_tables = Operation(
    reference_decode.head_page_tables, triton="page_tables", cpp=native.head_page_tables
)

__all__ = [
    "Grids",
    "HeldPages",
    "PageLayout",
    "PromptPages",
    "apportion",
    "as_bytes",
    "as_stored",
    "bacon_calibrate",
    "bacon_evidence",
    "cover_votes",
    "describe",
    "elite_attention",
    "gaussian_logits",
    "grid_balance",
    "group_attention_sum",
    "head_counts",
    "head_page_tables",
    "key_attention_sum",
    "last_row_logits",
    "missing_on",
    "output_norms",
    "pool_prefix",
    "read_prompt",
    "select_tokens",
    "stage_tokens",
    "strength_and_skewness",
    "strong_key_counts",
    "weigh_scores",
    "window_scores",
    "write_pages",
]
