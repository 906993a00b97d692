# SPDX-License-Identifier: Apache-2.0
"""Parts of ``gpu_check.py``; what runs in a process of its own is run as ``-m gpucheck.<part>``."""
