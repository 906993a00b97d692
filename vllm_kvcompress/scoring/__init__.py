# SPDX-License-Identifier: Apache-2.0
"""Scoring methods: one file each, one row in the table."""

from vllm_kvcompress.scoring.aircache import AirCache
from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.bacon_plus import BaconPlus
from vllm_kvcompress.scoring.base import (
    SCORERS,
    HiddenMoments,
    LayerTrace,
    Need,
    QueryMoments,
    QueryProjector,
    Scorer,
    Scores,
    ScoringContext,
)
from vllm_kvcompress.scoring.das import DAS
from vllm_kvcompress.scoring.elastic import Elastic
from vllm_kvcompress.scoring.expected import Expected
from vllm_kvcompress.scoring.h2o import H2O
from vllm_kvcompress.scoring.keydiff import KeyDiff
from vllm_kvcompress.scoring.mixkv import MixKV
from vllm_kvcompress.scoring.postvision import PostVision
from vllm_kvcompress.scoring.prefixkv import PrefixKV
from vllm_kvcompress.scoring.shiftkv import ShiftKV
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.scoring.streaming import Streaming

SCORERS |= {
    scorer.name: scorer
    for scorer in (
        SnapKV,
        Bacon,
        BaconPlus,
        MixKV,
        AirCache,
        ShiftKV,
        DAS,
        H2O,
        Expected,
        KeyDiff,
        Streaming,
        Elastic,
        PrefixKV,
        PostVision,
    )
}

__all__ = [
    "SCORERS",
    "HiddenMoments",
    "LayerTrace",
    "Need",
    "QueryMoments",
    "QueryProjector",
    "Scorer",
    "Scores",
    "ScoringContext",
]
