# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs that are not here, and takes no more from them than before.

Where a kernel takes more for a good reason, ``python -P tests/kernels/kernel_resources.py`` writes
the new numbers down.
"""

import ast
from pathlib import Path

import kernel_resources
import pytest
from kernel_resources import KERNELS

from vllm_kvcompress.kernels import reference


def test_every_kernel_is_in_the_table():
    folder = Path(reference.__file__).parent
    written = {
        node.name
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written == {name.split()[0] for name in KERNELS}
    expected = {
        (name, capability) for name, kernel in KERNELS.items() for capability in kernel.capabilities
    }
    assert kernel_resources.recorded().keys() == expected


@pytest.fixture(scope="module")
def measured():
    return kernel_resources.measure(list(KERNELS))


@pytest.mark.parametrize("name", KERNELS)
def test_takes_no_more_than_recorded(name, measured):
    recorded = kernel_resources.recorded()
    assert isinstance(measured[name], dict), measured[name]
    for capability, found in measured[name].items():
        before = recorded[name, capability]
        assert found.registers <= before.registers * 1.1, (capability, found, before)
        assert found.shared_bytes <= before.shared_bytes, (capability, found, before)
        assert found.spill_bytes == before.spill_bytes == 0, (capability, found, before)
