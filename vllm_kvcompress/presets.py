# SPDX-License-Identifier: Apache-2.0
"""Published systems as settings, under the names they are known by, and our own."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A published system, or our own.

    Attributes:
        source: its paper, or that of what it builds on.
        settings: as ``KVCompressionConfig.parse`` takes them; what the user gives wins.
    """

    source: str
    settings: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    "bacon": Preset("BACON, arXiv 2606.14782", {"method": "bacon+uniform"}),
    "bacon-plus": Preset(
        "this project, on BACON, arXiv 2606.14782", {"method": "bacon-plus+adakv"}
    ),
    "aircache": Preset(
        "AirCache, arXiv 2503.23956", {"method": "aircache+aircache", "budget": "10%"}
    ),
    "mm-shiftkv": Preset(
        "MM-ShiftKV, arXiv 2607.22586", {"method": "shiftkv+uniform", "preset": "released"}
    ),
    "myopia": Preset(
        "Myopia Rectification, CVPR 2026 Findings",
        {"method": "das+uniform+recycle", "budget": "20%"},
    ),
    "snapkv": Preset("SnapKV, arXiv 2404.14469", {"method": "snapkv+uniform"}),
    "pyramidkv": Preset(
        "PyramidKV, arXiv 2406.02069", {"method": "snapkv+pyramid", "rounding": "official"}
    ),
    "adakv": Preset("Ada-KV, arXiv 2407.11550", {"method": "snapkv+adakv", "rounding": "official"}),
    "sparsemm": Preset(
        "SparseMM, arXiv 2506.05344", {"method": "snapkv+sparsemm", "rounding": "official"}
    ),
    "mixkv": Preset("MixKV, arXiv 2510.20707", {"method": "mixkv+uniform"}),
    "h2o": Preset(
        "H2O, arXiv 2306.14048", {"method": "h2o+uniform", "budget": "20%", "recent_share": 0.5}
    ),
    "elastic": Preset(
        "Elastic Cache, arXiv 2407.18121", {"method": "elastic+uniform+elastic", "budget": "80%"}
    ),
    "prefixkv": Preset(
        "PrefixKV, arXiv 2412.03409", {"method": "prefixkv+prefixkv", "budget": "50%"}
    ),
    "vl-cache": Preset(
        "VL-Cache, arXiv 2410.23317", {"method": "postvision+vlcache", "budget": "10%"}
    ),
    "look-m": Preset(
        "LOOK-M, arXiv 2406.18139",
        {
            "method": "h2o+uniform+lookm",
            "budget": "20%",
            "recent_share": 0.5,
            "text_prior": True,
            "merge_mode": "pivot",
        },
    ),
    "expected-attention": Preset(
        "Expected Attention, arXiv 2510.00636", {"method": "expected+uniform"}
    ),
    "keydiff": Preset("KeyDiff, arXiv 2504.15364", {"method": "keydiff+uniform"}),
    "streaming-llm": Preset("StreamingLLM, arXiv 2309.17453", {"method": "streaming+uniform"}),
}
"""What a whole method string may be; a part of one names a scorer, an allocator or a merge."""
