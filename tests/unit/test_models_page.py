# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md and `vllm-kvcompress models` say what the rules and vLLM's sources do."""

import importlib.util
import re
from pathlib import Path

import pytest
import tiny_families
import tiny_hybrids
import tiny_models
import tiny_shared_kv

from vllm_kvcompress.adapter import model_table
from vllm_kvcompress.adapter.compatibility import ENGINE_RULES, MODEL_RULES
from vllm_kvcompress.tools import main as command

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
MODULES = model_table.text_models() | model_table.multimodal_models()
ROWS = {row.architecture: row for row in model_table.rows(MODULES)}


def test_the_page_is_what_the_command_prints(capsys):
    assert command.main(["models", "--markdown"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out, (
        "docs/compatibility.md is out of date; make it again: "
        "vllm-kvcompress models --markdown > docs/compatibility.md"
    )


def test_the_list_has_every_architecture(capsys):
    assert command.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*MODULES]


@pytest.mark.parametrize("rule", MODEL_RULES, ids=lambda rule: rule.feature)
def test_every_rule_is_about_models_that_vllm_has(rule):
    """A name or a mark that finds nothing would let a model seem to be served."""
    assert {*rule.names, *rule.except_for} <= MODULES.keys()
    if rule.mark:
        marked = [a for a, module in MODULES.items() if _has(rule.mark, module)]
        assert marked
        assert {*rule.except_for} <= {*marked}, "an exception from what is not marked"


def _has(mark: str, module: str) -> bool:
    return any(re.search(mark, source) for source in model_table._sources(module).values())


def test_texts_can_be_put_together():
    for rule in (*MODEL_RULES, *ENGINE_RULES):
        assert not f"{rule.reason}{rule.advice}".endswith(".")


@pytest.mark.parametrize(
    ("architecture", "served", "attention"),
    [
        ("LlamaForCausalLM", "yes", "full; sliding windows where configured"),
        ("Qwen3VLForConditionalGeneration", "yes", "full; sliding windows where configured"),
        ("LlavaForConditionalGeneration", "as its language model", "of its language model"),
        ("DeepseekV3ForCausalLM", "no", "latent attention (MLA)"),
        ("WhisperForConditionalGeneration", "no", "encoder-decoder models"),
        ("PaliGemmaForConditionalGeneration", "text only", "of its language model"),
        ("BloomForCausalLM", "no", "ALiBi"),
    ],
)
def test_rows(architecture, served, attention):
    row = ROWS[architecture]
    assert (row.served, row.attention) == (served, attention)


def test_conditions_are_told():
    assert "`alibi` is set" in ROWS["FalconForCausalLM"].remark
    assert "text only where `use_bidirectional" in ROWS["Gemma4ForConditionalGeneration"].remark


def test_what_ran_is_what_tests_serve():
    """Architectures of the project's own checkpoints, but for those that tests see refused."""
    generators = (tiny_models, tiny_families, tiny_hybrids, tiny_shared_kv)
    tables = "".join(module.__doc__ or "" for module in generators)
    made = set(re.findall(r"^\| \S+ +\| (\w+)", tables, re.MULTILINE)) & MODULES.keys()
    assert {a for a in made if ROWS[a].served != "no"} == model_table.RAN.keys()
    for file in model_table.RAN.values():
        assert (ROOT / "tests" / "integration" / file).is_file()


def test_models_that_attend_in_both_directions():
    """vLLM lists them by model type, where no configuration says so itself."""
    spec = importlib.util.find_spec("vllm.transformers_utils.model_arch_config_convertor")
    source = Path(spec.origin).read_text()
    (listed,) = re.findall(r"MM_PREFIX_LM_MODELS = \(([^)]*)\)", source)
    assert re.findall(r'"(\w+)"', listed) == [
        "bagel", "gemma3", "molmo2", "moondream3", "paligemma",
    ]  # fmt: skip
