# SPDX-License-Identifier: Apache-2.0
"""Right answers of small models under every method: test beds, questions, statistics, reports."""
