# SPDX-License-Identifier: Apache-2.0
"""Candidates that no step runs until a GPU has shown that they beat what is there.

``paged_decode`` is attention that walks head pages without page tables, ``cuda_selection`` selects
tokens by one CUDA launch per layer. ``kernel_bench.py`` times both; nothing of this is installed.
"""
