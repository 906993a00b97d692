# SPDX-License-Identifier: Apache-2.0
"""The ranking of PrefixKV."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.scoring.elastic import Elastic


@dataclass(frozen=True)
class PrefixKV(Elastic):
    """How much attention a token collected from all prompt tokens, as elastic, without its merge.

    Its own layer sizes are the allocator of the same name. Source: PrefixKV, arXiv 2412.03409.

    Adaptation notes: decoded tokens never push others out.

    Options: those of elastic.
    """

    name: ClassVar[str] = "prefixkv"
    source: ClassVar[str] = "PrefixKV, arXiv 2412.03409"
    cost: ClassVar[str] = "as h2o"
