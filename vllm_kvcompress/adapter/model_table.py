# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's generating models are served: its registry and sources, held against our rules.

Nothing is imported from a model's module, so the table does not depend on what is installed. What
the source of an architecture may build is found in its own module, in those whose layers it uses,
and in those of the language models that it names.
"""

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vllm.model_executor.models import registry

from vllm_kvcompress.adapter.compatibility import MODEL_RULES, ModelRule

RAN = {
    "Cohere2ForCausalLM": "test_attention_inputs.py",
    "Exaone4ForCausalLM": "test_attention_inputs.py",
    "Gemma4ForCausalLM": "test_attention_inputs.py",
    "Gemma3ForConditionalGeneration": "test_hybrid.py",
    "Gemma3ForCausalLM": "test_hybrid.py",
    "Gemma3nForCausalLM": "test_shared_kv.py",
    "GraniteMoeHybridForCausalLM": "test_hybrid_families.py",
    "InternVLForConditionalGeneration": "test_families.py",
    "Llama4ForCausalLM": "test_hybrid_families.py",
    "LlamaForCausalLM": "test_families.py",
    "LlavaNextForConditionalGeneration": "test_families.py",
    "LlavaOnevisionForConditionalGeneration": "test_families.py",
    "MistralForCausalLM": "test_families.py",
    "NemotronHForCausalLM": "test_hybrid_families.py",
    "Qwen2VLForConditionalGeneration": "test_families.py",
    "Qwen2_5_VLForConditionalGeneration": "test_families.py",
    "Qwen3NextForCausalLM": "test_hybrid_families.py",
    "Qwen3VLMoeForConditionalGeneration": "test_families.py",
    "Qwen3_5ForConditionalGeneration": "test_hybrid_families.py",
}
"""Architectures that tests serve, and the file in tests/integration that does."""

STATUSES = ("yes", "as its language model", "depends", "text only", "no")
"""Whether an architecture is served; "depends": the remark says on what."""

_FOLDER = "vllm.model_executor.models"
_IMPORTS = re.compile(rf"^\s*from (?:{_FOLDER})?\.(\w+) import (\([^)]*\)|[^\n]+)", re.MULTILINE)
_PARTS = re.compile(r"\w(Model|ForCausalLM|DecoderLayer|Attention|ForConditionalGeneration)\b")
_TOWERS = re.compile(r"(?<!one)vision|vit|siglip|clip|whisper|audio|conformer|swin|radio|blip")
_NAMED_MODELS = re.compile(r"architectures=\[\"(\w+)\"\]")
_ANY_MODEL = re.compile(r"init_vllm_registered_model\(")
_BESIDE = {
    "sliding windows where configured": re.compile(r"per_layer_sliding_window|\bsliding_window="),
    "chunks": re.compile(r"\bChunkedLocalAttention\b"),
    "layers with a state": re.compile(r"\bIsHybrid\b"),
    "layers that read the cache of others": re.compile(r"\bkv_sharing_target_layer_name=kv_"),
}
"""Layers that may stand beside full attention, and what tells them."""


class Row(NamedTuple):
    """One architecture.

    Attributes:
        architecture: as a checkpoint names it.
        attention: kinds of its attention layers.
        served: one of STATUSES.
        remark: why it is refused, or where.
        evidence: what the row rests on.
    """

    architecture: str
    attention: str
    served: str
    remark: str
    evidence: str


def text_models() -> dict[str, str]:
    """Modules of the architectures that generate text from text."""
    known = {**registry._TEXT_GENERATION_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    return _modules(known.keys() - multimodal_models().keys())


def multimodal_models() -> dict[str, str]:
    """Modules of the architectures that generate text from images, video or sound as well."""
    backend = registry._TRANSFORMERS_SUPPORTED_MODELS.items()
    more = {name for name, (_, cls) in backend if "MultiModal" in cls}
    return _modules(registry._MULTIMODAL_MODELS.keys() | more)


def _modules(architectures: set[str]) -> dict[str, str]:
    names = sorted(architectures, key=lambda name: (name.lower(), name))
    return {name: _module(name) for name in names}


def _module(architecture: str) -> str:
    model = registry.ModelRegistry.models[architecture]
    assert isinstance(model, registry._LazyRegisteredModel), "vLLM's own"
    return model.module_name


def rows(modules: dict[str, str]) -> list[Row]:
    """The table of these architectures."""
    return [_row(architecture, module) for architecture, module in modules.items()]


def _row(architecture: str, module: str) -> Row:
    found = list(rules_of(architecture, module))
    always = [rule for rule, condition in found if not condition and not rule.text_only]
    evidence = f"ran: {RAN[architecture]}" if architecture in RAN else "by reading"
    if always:
        kinds = ", ".join(rule.feature for rule in always)
        return Row(architecture, kinds, "no", "", evidence)
    text_only = any(rule.text_only and not condition for rule, condition in found)
    remarks = [
        f"{'text only' if rule.text_only else 'refused'} where {condition}: {rule.feature}"
        for rule, condition in found
        if condition
    ]
    remarks += [rule.feature for rule, condition in found if rule.text_only and not condition]
    served = "text only" if text_only else "yes"
    if any(condition and not rule.text_only for rule, condition in found):
        served = "depends"
    sources = "\n".join(_sources(module).values())
    kinds = "; ".join(["full", *(kind for kind, mark in _BESIDE.items() if mark.search(sources))])
    if any(_takes_any_model(source) for source in _sources(module).values()):
        kinds = "of its language model"
        served = "as its language model" if served == "yes" and architecture not in RAN else served
    return Row(architecture, kinds, served, "; ".join(remarks), evidence)


def rules_of(architecture: str, module: str) -> Iterator[tuple[ModelRule, str]]:
    """Rules that an architecture falls under, and where it does; "" for always."""
    for rule in MODEL_RULES:
        if architecture in rule.names:
            yield rule, ""
        elif rule.mark and architecture not in rule.except_for:
            sources = _sources(module).values()
            if any(re.search(rule.mark, source) for source in sources):
                yield rule, rule.condition


@functools.cache
def _sources(module: str) -> dict[str, str]:
    """Source text of a module and of those it builds its language model from, by module."""
    found: dict[str, str] = {}
    missing = [module]
    while missing:
        name = missing.pop()
        if name in found:
            continue
        source = found[name] = _source(name)
        missing += [
            f"{_FOLDER}.{other}"
            for other, names in _IMPORTS.findall(source)
            if _PARTS.search(names) and not _TOWERS.search(other)
        ]
        known = registry.ModelRegistry.models
        named = _NAMED_MODELS.findall(source)
        missing += [_module(model) for model in named if model in known]
    return found


def _takes_any_model(source: str) -> bool:
    """Whether the checkpoint's configuration says what the language model is."""
    named = any(name in registry.ModelRegistry.models for name in _NAMED_MODELS.findall(source))
    return bool(_ANY_MODEL.search(source)) and not named


@functools.cache
def _source(module: str) -> str:
    """Of a module, or of all files of a package that holds one model."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a module inside a model's package
        return ""
    path = Path(spec.origin)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return "\n".join(file.read_text() for file in files)
