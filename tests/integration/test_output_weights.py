# SPDX-License-Identifier: Apache-2.0
"""Output projections: which is found beside an attention layer, and what is read of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import RowParallelLinear

from vllm_kvcompress.adapter import output_weights
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

HEADS, SIZE, WIDTH = 4, 8, 24
CONFIG = KVCompressionConfig.parse({"method": "bacon-plus", "budget": 64})


class Packed(RowParallelLinear):
    """A projection whose weight is nowhere to be seen, as after packing."""

    def __init__(self, reads: int) -> None:
        nn.Module.__init__(self)
        self.input_size_per_partition, self.params_dtype = reads, torch.float32
        self.register_buffer("scale", torch.ones(1))
        weight = torch.randn(WIDTH, reads, generator=torch.Generator().manual_seed(reads))
        self.expected = weight
        self.quant_method = SimpleNamespace(apply=self._apply_packed)

    def _apply_packed(self, layer: nn.Module, rows: torch.Tensor, bias: None) -> torch.Tensor:
        assert layer is self
        return rows @ self.expected.T


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_name = f"model.layers.{number}.self_attn.attn"
        self.num_heads, self.head_size = HEADS, SIZE


def block(number: int, **children: nn.Module) -> tuple[nn.Module, Layer]:
    parent, layer = nn.Module(), Layer(number)
    for name, child in ({"attn": layer} | children).items():
        parent.add_module(name, child)
    return parent, layer


def test_every_head_has_the_products_of_its_part():
    """In the order of layers, whatever the order in which they come."""
    blocks = [block(n, o_proj=Packed(HEADS * SIZE), gate=Packed(SIZE)) for n in range(2)]
    model = nn.ModuleList(parent for parent, _ in blocks)
    layers = [layer for _, layer in blocks]
    blocks[1][0].o_proj.expected *= 2
    output_weights.install(model, layers[::-1], CONFIG)
    found = output_weights.grams_of(layers)
    assert found.shape == (2, HEADS, SIZE, SIZE)
    value = torch.randn(SIZE)
    for index, (parent, _) in enumerate(blocks):
        parts = parent.o_proj.expected.unflatten(1, (HEADS, SIZE))  # [d, Hq, D]
        norms = (parts @ value).norm(dim=0)
        torch.testing.assert_close((found[index] @ value @ value).sqrt(), norms)


@pytest.mark.parametrize(
    "children",
    [{}, {"o_proj": Packed(SIZE)}, {"o_proj": nn.Linear(HEADS * SIZE, WIDTH)},
     {"o_proj": Packed(HEADS * SIZE), "other": Packed(HEADS * SIZE)}],
    ids=["none", "another width", "another kind", "two"],
)  # fmt: skip
def test_refused_by_name(children):
    parent, layer = block(3, **children)
    with pytest.raises(KVCompressionError, match=r"bacon-plus weighs .* model\.layers\.3") as error:
        output_weights.install(parent, [layer], CONFIG)
    assert '"weight": "none"' in str(error.value)


def test_nothing_is_read_for_others():
    parent, layer = block(0)
    for raw in ({"method": "bacon"}, {"method": "bacon-plus", "weight": "none"}):
        output_weights.install(parent, [layer], KVCompressionConfig.parse(raw))
