# SPDX-License-Identifier: Apache-2.0
"""Found first on PYTHONPATH, this lets vLLM run its Triton kernels in Triton's interpreter.

vLLM uses Triton on a CPU only if Triton has a CPU backend. An entry for one that is never compiled
for is enough: with TRITON_INTERPRET=1 kernels are plain Python. So Model Runner V2, the default on
GPUs, runs on a CPU: slowly, and correctly in float32 only.
"""

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends.setdefault("cpu", triton.backends.Backend(compiler=None, driver=_Driver))
