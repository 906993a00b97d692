# SPDX-License-Identifier: Apache-2.0
"""Stands in for Arctic Inference, which has to be compiled, where it is not installed."""
