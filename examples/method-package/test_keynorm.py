# SPDX-License-Identifier: Apache-2.0
"""Run with: python -P -m pytest test_keynorm.py"""

import pytest
from keynorm_method import KeyNorm

from vllm_kvcompress.testing import check_scorer


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_owes_nothing(power):
    check_scorer(KeyNorm, power=power)
