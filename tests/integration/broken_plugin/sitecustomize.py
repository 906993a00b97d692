# SPDX-License-Identifier: Apache-2.0
"""Found first on PYTHONPATH: the module named by BROKEN_MODULE cannot be imported."""

import os
import sys


class _Broken:
    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name == os.environ["BROKEN_MODULE"]:
            raise ImportError(f"{name} is broken in this test")


sys.meta_path.insert(0, _Broken)
