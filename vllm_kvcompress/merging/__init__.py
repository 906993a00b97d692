# SPDX-License-Identifier: Apache-2.0
"""Merges: what becomes of dropped tokens. One file each, one row in the table."""

from vllm_kvcompress.merging.base import Merge, MergeContext
from vllm_kvcompress.merging.elastic import Elastic
from vllm_kvcompress.merging.lookm import LookM
from vllm_kvcompress.merging.recycle import Recycle

MERGES: dict[str, type[Merge]] = {merge.name: merge for merge in (LookM, Elastic, Recycle)}
"""By name; "none" is the absence of one."""

__all__ = ["MERGES", "Merge", "MergeContext"]
