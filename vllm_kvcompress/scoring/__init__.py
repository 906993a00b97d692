# SPDX-License-Identifier: Apache-2.0
"""Scoring methods: one file each, one row in the table."""

from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.base import LayerContext, LayerTrace, Need, Scorer, Scores
from vllm_kvcompress.scoring.snapkv import SnapKV

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (SnapKV, Bacon)}

__all__ = ["SCORERS", "LayerContext", "LayerTrace", "Need", "Scorer", "Scores"]
