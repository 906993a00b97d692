# SPDX-License-Identifier: Apache-2.0
"""A compressing call launches few kernels, however many prompts and layers it has."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vllm_kvcompress.kernels.operations import OPERATIONS

PATH = Path(__file__).parents[2] / "benchmarks" / "launches.py"
MOST = {"bacon": 40, "bacon-plus+uniform": 60, "bacon+adakv": 70, "aircache": 80, "vl-cache": 80}


@pytest.fixture(scope="module")
def launches():
    spec = importlib.util.spec_from_file_location("launches", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("method", "most"), MOST.items())
def test_few_launches(launches, method, most):
    counted = launches.count(method, launches.sizes_of(1))
    assert 0 < counted.in_triton < counted.total <= most
    together = launches.count(method, launches.sizes_of(8))
    assert together.in_triton == counted.in_triton
    assert together.total <= counted.total + 5  # what is contiguous of one prompt is copied of many


def test_groups_of_layers_launch_as_much_each(launches):
    """The benchmark sees what a small workspace costs."""
    sizes = (launches.WORKSPACE, 1 << 25)
    one = launches.sizes_of(1)
    whole, split = (launches.count("bacon", one, size).total for size in sizes)
    assert split > 1.5 * whole


def test_views_and_allocations_do_not_count(launches):
    with launches.counted() as found:
        x = torch.empty(4, 4, device="meta")
        x.view(2, 8)[:, 1:].transpose(0, 1).expand(3, -1, -1).unbind()
        assert found.total == 0
        (x + x).sum()
    assert [what for what, _ in found.found] == ["add", "sum"]


def test_nothing_stays_as_counted(launches):
    with launches.counted():
        pass
    assert all("meta" not in operation._chosen for operation in OPERATIONS.values())
