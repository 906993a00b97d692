# SPDX-License-Identifier: Apache-2.0
"""Visual tokens of a prompt, read from vLLM's multimodal features."""

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
