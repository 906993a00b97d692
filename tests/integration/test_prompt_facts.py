# SPDX-License-Identifier: Apache-2.0
"""Visual tokens of a prompt, read from vLLM's multimodal features."""

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vllm_kvcompress.adapter.kv_cache import prompt_facts


def feature(modality: str, offset: int, embeds: str, **data: torch.Tensor) -> MultiModalFeatureSpec:
    """``embeds``: one character per position, "x" where an embedding goes."""
    field = MultiModalBatchedField()
    items = {name: MultiModalFieldElem(value, field) for name, value in data.items()}
    mask = torch.tensor([c == "x" for c in embeds])
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(items) if items else None,
        modality=modality,
        identifier="",
        mm_position=PlaceholderRange(offset, len(embeds), mask),
    )


def segments(*features: MultiModalFeatureSpec) -> str:
    found = prompt_facts(20, features).segments(20)
    return "".join("." if number < 0 else str(number) for number in found)


def test_images():
    """Rows of one image with text in between are one segment; images side by side are two."""
    assert segments(feature("image", 2, "xx.xx"), feature("image", 9, "xxx")) == (
        "..00.00..111........"
    )
    assert segments(feature("image", 2, "xx"), feature("image", 4, "xxx")) == "..00111............."


def test_video_has_a_segment_per_temporal_patch():
    grid = torch.tensor([3, 2, 4])
    assert segments(feature("video", 1, "xxxxxx", video_grid_thw=grid)) == ".001122............."
    spaced = feature("video", 1, "xx.xx.xx", video_grid_thw=grid)
    assert segments(spaced) == ".00.11.22..........."


def test_video_without_a_grid_has_a_segment_per_run():
    """InternVL names each frame in text; frames without text in between stay together."""
    assert segments(feature("video", 1, "xx..xx..xx")) == ".00..11..22........."
    assert segments(feature("video", 1, "xxxxxx")) == ".000000............."
    both = feature("video", 1, "xx.xx"), feature("image", 8, "xx.x")
    assert segments(*both) == ".00.11..22.2........"


def test_features_without_an_embedding():
    assert segments(feature("image", 1, "..."), feature("video", 6, "..")) == "." * 20


def test_other_modalities_are_text():
    assert segments(feature("audio", 1, "xxx"), feature("image", 6, "xx")) == "......00............"


def lines(*features: MultiModalFeatureSpec) -> list[list[int]]:
    return prompt_facts(40, features).grids(len(features)).tolist()


def test_grids_count_merged_patches():
    """Four patches make a token: 4 x 6 of them are 2 rows of 3 tokens."""
    image = feature("image", 2, "xxxxxx", image_grid_thw=torch.tensor([[1, 4, 6]]))
    other = feature("image", 9, "xx.xx.xx", image_grid_thw=torch.tensor([1, 3, 2]))
    assert lines(image, other) == [[2, 8, 3, 3], [9, 17, 2, 3]]


def test_every_frame_has_a_grid_of_its_own():
    grid = torch.tensor([3, 4, 6])
    video = feature("video", 1, "xxxxxx.xxxxxx.xxxxxx", video_grid_thw=grid)
    assert prompt_facts(40, [video]).grids(3).tolist() == [
        [1, 7, 3, 3], [8, 14, 3, 3], [15, 21, 3, 3]
    ]  # fmt: skip


@pytest.mark.parametrize("grid", [[1, 4, 6], [1, 2, 4], [1, 3, 3], [1, 8, 0]])
def test_tokens_that_are_no_grid(grid):
    """Some were dropped, or patches make no squares."""
    image = feature("image", 1, "xxxx", image_grid_thw=torch.tensor(grid))
    assert lines(image) == [[0] * 4]
    assert lines(feature("image", 1, "xxxx")) == [[0] * 4]
