# SPDX-License-Identifier: Apache-2.0
"""Slow, independent oracle: scores, kept sets, merges and greedy output of a compressed prompt.

Selection is numpy in float64. The model is a Hugging Face checkpoint in float32 on the CPU: one
uncompressed prefill gives what every method needs, the kept sets follow from it, and each decode
step runs on the *full* cache with the evicted prompt positions of every KV head masked to -inf.
Nothing is ever moved, so every entry keeps its logical position, RoPE and M-RoPE included. Merged
entries take the slot of the token that they replace, bins that of a token they swallowed.

Symbols: L layers, Hq query heads, Hkv KV heads, D head size, P prompt tokens, W window, R recent
tokens that a scorer always keeps, n = P - R scored prefix columns, bs block size, m = P // bs full
blocks, tail = P - m*bs.

    |0 ................................. m*bs| .... P|    prompt
    |        m full blocks: compacted        | tail  |    the tail is always kept
    |0 ........................ P-R| .............. P|    prefix (scored) | recent (pinned)

With visual candidates everything but the visual tokens of the prefix is pinned.
"""

from oracle.allocators import adakv_capacities, apportion
from oracle.attention import best_positions, pool1d
from oracle.config import OracleConfig
from oracle.model import Oracle, OracleOutput
from oracle.plan import KeptSets, Selection, kept_sets, merged_entries, page_plan, select
from oracle.prompt import Prompt
from oracle.scorers import scores

__all__ = [
    "KeptSets",
    "Oracle",
    "OracleConfig",
    "OracleOutput",
    "Prompt",
    "Selection",
    "adakv_capacities",
    "apportion",
    "best_positions",
    "kept_sets",
    "merged_entries",
    "page_plan",
    "pool1d",
    "scores",
    "select",
]
