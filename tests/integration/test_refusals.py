# SPDX-License-Identifier: Apache-2.0
"""What cannot be compressed is refused before the first request, with what to change."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from engine import (
    Method,
    assert_same,
    compressed_layers,
    engine,
    generate,
    model_runner,
    random_prompt,
    scheduler_of,
)
from subprocesses import HERE, result_of, run_python
from transformers import CONFIG_MAPPING
from vllm import SamplingParams
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.adapter import attention_inputs, compatibility, selection
from vllm_kvcompress.adapter.backend import CompressedBackend
from vllm_kvcompress.adapter.cpu import CompressedCPUImpl
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

BACON = {"method": "bacon", "budget": 96}
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 2}


def configure(model: str, compression, **settings):
    """The engine's configuration, as ``vllm serve`` and ``LLM`` make it: nothing is loaded."""
    load_general_plugins()
    arguments = {
        "max_model_len": 400,
        "block_size": 32,
        "dtype": "float32",
        "kv_cache_memory_bytes": 64 << 20,
    } | settings
    return EngineArgs(
        model=model, additional_config={"kv_compression": compression}, **arguments
    ).create_engine_config()


def test_plain_model_is_accepted(checkpoint):
    config = configure(checkpoint("llama"), BACON)
    assert KVCompressionConfig.parse(config.additional_config["kv_compression"]).method == (
        "bacon+uniform"
    )


def test_float8_caches_of_other_kinds(checkpoint, monkeypatch):
    """Some of ROCm's GPUs have types of their own."""
    model = checkpoint("llama")
    configure(model, BACON, kv_cache_dtype="fp8")
    monkeypatch.setattr(compatibility, "current_platform", SimpleNamespace(is_rocm=lambda: True))
    configure(model, BACON)
    with pytest.raises(KVCompressionError, match=r"float8.*use --kv-cache-dtype auto"):
        configure(model, BACON, kv_cache_dtype="fp8")


CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


@pytest.mark.parametrize(
    ("family", "settings", "reason", "advice"),
    [
        ({"family": "deepseek-v2", "dtype": "bfloat16"}, {"dtype": "bfloat16"}, "MLA",
         "without --kv-compression"),
        ({"family": "whisper"}, {}, "encoder-decoder", "without --kv-compression"),
        ({}, {"runner": "pooling"}, "pooling models", "without --kv-compression"),
        ({}, {"kv_transfer_config": CONNECTOR}, "KV connectors", "remove --kv-transfer-config"),
        ({}, {"kv_offloading_size": 1.0}, "offloading", "--kv-offloading-size"),
        ({"kv_heads": 1},
         {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
         "decode context parallelism", "set --decode-context-parallel-size 1"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline parallelism",
         "set --pipeline-parallel-size 1"),
        ({}, {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "micro-batching",
         "--ubatch-size"),
        ({}, {"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype int8_per_token_head",
         "use --kv-cache-dtype fp8 or auto"),
        ({}, {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]}, "unlike types",
         "remove --kv-cache-dtype-skip-layers"),
        ({}, {"kv_sharing_fast_prefill": True}, "share KV", "remove --kv-sharing-fast-prefill"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_engine_features(checkpoint, family, settings, reason, advice):
    with pytest.raises(KVCompressionError) as refusal:
        configure(checkpoint(**({"family": "llama"} | family)), BACON, **settings)
    message = str(refusal.value)
    assert message.startswith("KV compression cannot start:\n  - ")
    assert reason in message
    assert advice in message
    assert message.count("\n  - ") == 1


def test_drafters_that_are_models(checkpoint):
    model = checkpoint("llama")
    with pytest.raises(KVCompressionError) as refusal:
        configure(model, BACON, speculative_config={**DRAFT_MODEL, "model": model})
    assert "speculative decoding by draft_model" in str(refusal.value)
    assert "the method of --speculative-config to ngram or suffix" in str(refusal.value)
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    assert configure(model, BACON, speculative_config=ngram).speculative_config.use_ngram()


@pytest.mark.parametrize(
    ("compression", "settings", "expected"),
    [
        ({"method": "bacno"}, {}, ["unknown scorer 'bacno'", "Did you mean 'bacon'?", "snapkv"]),
        ({"method": "bacon+adkv"}, {}, ["unknown allocator 'adkv'", "Did you mean 'adakv'?"]),
        ({"budget": 64}, {}, ["no method", '{"method": "bacon"}']),
        (BACON | {"bugdet": 1}, {}, ["unknown key 'bugdet'", "Did you mean 'budget'?"]),
        (BACON | {"alpha": 0.1}, {}, ["unknown key 'alpha' for bacon", "Valid: method, budget"]),
        (BACON | {"mode": "rle"}, {}, ["mode must be one of e, el, elt, rel, got 'rle'"]),
        (BACON | {"kernel": 4}, {}, ["kernel", "4"]),
        (BACON | {"budget": "lots"}, {}, ["--kv-budget", "positive number of tokens", "'lots'"]),
        (BACON | {"budget": 0}, {}, ["--kv-budget", "got 0"]),
        (BACON | {"budget": -5}, {}, ["--kv-budget", "got -5"]),
        (BACON | {"budget": "120%"}, {}, ["--kv-budget", "got '120%'"]),
        (BACON | {"budget": 32}, {}, ["--kv-budget 32", "larger than --kv-window 32", "33"]),
        (BACON | {"window": 0}, {}, ["--kv-window", "got 0"]),
        (BACON | {"window": "many"}, {}, ["--kv-window", "got 'many'"]),
        (BACON | {"budget": 500, "window": 450}, {}, ["--kv-window 450", "--max-model-len 400"]),
        (BACON | {"budget": 48}, {"block_size": 64},
         ["--kv-budget 48 is smaller than one block", "--kv-budget 64 or more"]),
        ("bacon", {}, ['additional_config["kv_compression"] must be an object', "'bacon'"]),
    ],
)  # fmt: skip
def test_bad_values(checkpoint, compression, settings, expected):
    with pytest.raises(KVCompressionError) as refusal:
        configure(checkpoint("llama"), compression, **settings)
    for part in expected:
        assert part in str(refusal.value)


def test_all_reasons_at_once(checkpoint):
    with pytest.raises(KVCompressionError) as refusal:
        configure(
            checkpoint("llama"),
            {"method": "bacon", "budget": 48},
            block_size=64,
            pipeline_parallel_size=2,
            speculative_config={**DRAFT_MODEL, "model": checkpoint("llama")},
            kv_offloading_size=1.0,
        )
    lines = str(refusal.value).splitlines()[1:]
    assert len(lines) == 4
    assert all(line.startswith("  - ") and line.endswith(".") for line in lines)
    with pytest.raises(KVCompressionError) as refusal:
        configure(checkpoint("llama"), {"method": "x+y", "budget": "z", "window": -1})
    assert len(str(refusal.value).splitlines()) == 5


def test_prefill_context_parallelism(checkpoint):
    """Only Model Runner V2 on GPUs has it; so the reason is asked for directly."""
    config = configure(checkpoint("llama"), BACON)
    config.parallel_config.prefill_context_parallel_size = 2
    (reason,) = compatibility.engine_reasons(config, KVCompressionConfig.parse(BACON))
    assert "set --prefill-context-parallel-size 1" in reason


def test_operations_without_a_kernel(checkpoint):
    """A device on which operations would run on their definitions; so there is no such engine."""
    config = configure(checkpoint("llama"), BACON)
    config.device_config.device_type = "xpu"
    (reason,) = compatibility.engine_reasons(config, KVCompressionConfig.parse(BACON))
    assert "xpu" in reason


def built(**properties) -> SimpleNamespace:
    """What a layer shows of itself; without properties there is nothing against it."""
    none = {"sinks": None, "alibi_slopes": None}
    return SimpleNamespace(**none | {"kv_cache_dtype": "auto"} | properties)


def test_attention_features():
    """Properties of single layers, all in one list."""
    for served in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16"):
        compatibility.check_layer(built(kv_cache_dtype=served))
    every = {
        "sinks": ("sinks", torch.zeros(2)),
        "ALiBi": ("alibi_slopes", [0.5]),
        "nvfp4": ("kv_cache_dtype", "nvfp4"),
    }
    for text, (name, value) in every.items():
        with pytest.raises(KVCompressionError, match=f"{text}.*{compatibility.WITHOUT}"):
            compatibility.check_layer(built(**{name: value}))
    with pytest.raises(KVCompressionError) as refusal:
        compatibility.check_layer(built(**dict(every.values())))
    assert all(text in str(refusal.value) for text in every)


def test_scales_of_single_heads():
    """Checkpoints bring them; one scale may come as a number or as a row of one."""
    layers = [torch.nn.Module(), torch.nn.Module()]
    for layer in layers:
        layer.impl = SimpleNamespace(logits_soft_cap=None)
    layers[0].register_buffer("_k_scale", torch.tensor(0.5))
    layers[1].register_buffer("_k_scale", torch.tensor([0.5]))
    compatibility.check_layers(layers)
    layers[1].register_buffer("_k_scale", torch.tensor([0.5, 0.25]))
    with pytest.raises(KVCompressionError, match=r"each KV head.*without --kv-compression"):
        compatibility.check_layers(layers)
    layers[1].impl.logits_soft_cap = 30.0
    with pytest.raises(KVCompressionError, match=r"each KV head[^$]*cap their logits differently"):
        compatibility.check_layers(layers)


@pytest.mark.parametrize(
    ("extra", "text"),
    [({"alibi_slopes": [0.5, 0.25]}, "ALiBi"), ({"sinks": torch.zeros(2)}, "sinks")],
    ids=["alibi", "sinks"],
)
def test_attention_layers(checkpoint, extra, text):
    """The layer itself refuses, when vLLM builds it."""
    arguments = {
        "num_heads": 2,
        "head_size": 32,
        "scale": 1.0,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    with set_current_vllm_config(configure(checkpoint("llama"), BACON)):
        CompressedCPUImpl(**arguments)
        with pytest.raises(KVCompressionError, match=text):
            CompressedCPUImpl(**(arguments | extra))


def test_model_without_full_attention(checkpoint):
    """Two layers of gemma3 are two sliding windows: nothing could be compressed."""
    with pytest.raises(KVCompressionError, match=r"every layer.*without --kv-compression"):
        configure(checkpoint("gemma3", layers=2), BACON)


def test_hybrid_manager_turned_off(checkpoint):
    """vLLM then treats sliding windows as full attention, in one group with ours."""
    with pytest.raises(KVCompressionError, match="remove --disable-hybrid-kv-cache-manager"):
        configure(checkpoint("gemma3", layers=6), BACON, disable_hybrid_kv_cache_manager=True)


TEXT_ONLY = "--language-model-only"
MODELS = {
    "latent": ("DeepseekV3ForCausalLM", "deepseek_v3", {}, "MLA"),
    "mamba": ("Mamba2ForCausalLM", "mamba2", {}, "no attention layers"),
    "sinks": ("GptOssForCausalLM", "gpt_oss", {}, "sinks"),
    "granite's sinks": ("GraniteForCausalLM", "granite",
                        {"layer_types": ["sliding_attention", "full_attention"] * 16}, "sinks"),
    "alibi": ("BloomForCausalLM", "bloom", {}, "ALiBi"),
    "images": ("PaliGemmaForConditionalGeneration", "paligemma", {}, TEXT_ONLY),
    "images of Gemma 3": ("Gemma3ForConditionalGeneration", "gemma3", {}, TEXT_ONLY),
}  # fmt: skip


@pytest.fixture
def published(checkpoint, tmp_path, monkeypatch):
    """``published(architecture, model_type, settings)``: a folder with a configuration alone."""
    lazy = registry._LazyRegisteredModel  # looks at a class in a process of its own: 6 s each
    monkeypatch.setattr(
        lazy,
        "inspect_model_cls",
        lambda self: registry._ModelInfo.from_model_cls(self.load_model_cls()),
    )
    shutil.copytree(
        checkpoint("llama"),
        tmp_path / "model",
        ignore=shutil.ignore_patterns("config.json", "recipe.json", "*.safetensors"),
    )

    def make(architecture: str, model_type: str, settings: dict) -> str:
        config = CONFIG_MAPPING[model_type](**settings)
        config.architectures = [architecture]
        config.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return make


@pytest.mark.parametrize("model", MODELS)
def test_models_by_their_configuration_alone(published, model):
    """Nothing is loaded: there are no weights."""
    *configuration, reason = MODELS[model]
    with pytest.raises(KVCompressionError, match=reason) as refusal:
        configure(published(*configuration), BACON, dtype="bfloat16")
    lines = str(refusal.value).splitlines()[1:]
    assert len(lines) == 1
    assert "--disable-hybrid" not in lines[0]
    assert compatibility.WITHOUT in lines[0]


@pytest.mark.parametrize(
    "configuration",
    [
        ("GraniteForCausalLM", "granite", {}),
        ("GraniteMoeHybridForCausalLM", "granitemoehybrid", {"layer_types": ["attention"] * 32}),
        ("MistralForCausalLM", "mistral", {}),
        ("Gemma3nForCausalLM", "gemma3n_text", {}),
        ("Gemma4ForCausalLM", "gemma4_text", {"num_kv_shared_layers": 20}),
        ("Qwen3NextForCausalLM", "qwen3_next", {}),
        ("Qwen3_5ForConditionalGeneration", "qwen3_5", {}),
        (
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            {"layer_types": ["mamba", "attention"] * 16},
        ),
        ("Lfm2ForCausalLM", "lfm2", {"layer_types": ["conv", "full_attention"] * 16}),
        ("Llama4ForConditionalGeneration", "llama4", {}),
    ],
    ids=lambda configuration: configuration[0],
)
def test_models_that_look_alike_but_are_served(published, configuration):
    configure(published(*configuration), BACON, dtype="bfloat16")


@pytest.mark.parametrize(
    "flag", [{"language_model_only": True}, {"limit_mm_per_prompt": {"image": 0}}]
)
def test_without_images_they_are_accepted(published, flag):
    """The advice for models that attend to images in both directions."""
    for model in ("images", "images of Gemma 3"):
        configure(published(*MODELS[model][:3]), BACON, dtype="bfloat16", **flag)


HALF, SINGLE = torch.bfloat16, torch.float32
FLASH = "set --attention-backend FLASH_ATTN"
TRITON = "set --attention-backend TRITON_ATTN"
DEVICES = {
    "B200": ((10, 0), 64, HALF, "auto", FLASH),
    "L40S, fp8": ((8, 9), 64, HALF, "fp8", TRITON),
    "SM120, fp8": ((12, 0), 64, HALF, "fp8", TRITON),
    "A100, fp8": ((8, 0), 64, HALF, "fp8", f"{FLASH} --kv-cache-dtype bfloat16"),
    "H100, float32": ((9, 0), 64, SINGLE, "auto", TRITON),
    "A100, float32, fp8": ((8, 0), 64, SINGLE, "fp8", f"{TRITON} --kv-cache-dtype bfloat16"),
    "A100, wide heads": ((8, 0), 512, HALF, "auto", TRITON),
    "T4": ((7, 5), 64, torch.float16, "auto", TRITON),
    "T4, bfloat16": ((7, 5), 64, torch.float16, "bfloat16",
                     f"{TRITON} --kv-cache-dtype float16"),
    "L4, narrow heads": ((8, 9), 20, HALF, "auto", "none of its own can serve this here"),
    "ROCm": (None, 64, HALF, "auto", TRITON),
    "TPU": ((), 64, HALF, "auto", "CUDA, on ROCm and on CPUs"),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_other_backends(checkpoint, monkeypatch, device):
    """One that the user named is refused, with what vLLM says ours take on that device.

    One that vLLM chose is replaced where nothing else has to change, in sliding layers, too.
    """
    capability, head_size, dtype, cache_dtype, expected = DEVICES[device]
    platform = SimpleNamespace(
        is_cuda=lambda: bool(capability),
        is_cuda_alike=lambda: capability is None or bool(capability),
        get_device_capability=lambda: DeviceCapability(*capability) if capability else None,
    )
    monkeypatch.setattr(selection, "current_platform", platform)
    monkeypatch.setattr(
        FlashAttentionBackend,
        "supports_kv_cache_dtype",
        lambda cache_dtype: not cache_dtype.startswith("fp8"),
    )

    @functools.wraps(selector.get_attn_backend)
    def get_attn_backend(*args, **kwargs):
        return FlexAttentionBackend

    choice = selection._choose(get_attn_backend)
    layer = functools.partial(choice, head_size, dtype, cache_dtype)
    config = configure(checkpoint("llama"), BACON)
    sole = expected in (FLASH, TRITON)
    with set_current_vllm_config(config):
        if sole:
            ours, sliding = layer(), layer(has_sliding_window=True)
            assert issubclass(ours, CompressedBackend)
            assert ours.get_name() == sliding.get_name() == expected.split()[-1]
            assert not issubclass(sliding, CompressedBackend)
            assert layer(attn_type=AttentionType.ENCODER_ONLY) is FlexAttentionBackend
        config.attention_config.backend = AttentionBackendEnum.FLEX_ATTENTION
        with pytest.raises(KVCompressionError, match="FLEX_ATTENTION") as refusal:
            layer(attn_type=AttentionType.DECODER)
        assert layer(has_sliding_window=True) is FlexAttentionBackend
        config.attention_config.backend = None
        if not sole:
            with pytest.raises(KVCompressionError, match="FLEX_ATTENTION"):
                layer()
    assert expected in str(refusal.value)
    works = expected.startswith((FLASH, TRITON))
    assert (compatibility.WITHOUT in str(refusal.value)) is not works


@pytest.mark.parametrize(("scorer", "lookahead"), [("shiftkv", 512), ("expected", 100)])
def test_positions_past_the_rotary_table(checkpoint, scorer, lookahead):
    """Queries of coming tokens need positions that the model can rotate to; it has 4096."""
    options = (("proxies", 512),) if scorer == "shiftkv" else (("horizon", lookahead),)
    longest = 4096 - lookahead
    with (
        pytest.raises(KVCompressionError, match=f"{scorer}.*--max-model-len {longest} or less"),
        engine(
            checkpoint("llama", layers=2),
            Method(scorer, 96, options=options),
            max_model_len=longest + 1,
        ),
    ):
        pass


def test_attention_without_the_usual_parts(checkpoint, monkeypatch):
    """A model that rotates in another way is refused by name of the layer."""
    original = attention_inputs.install

    def install(model, *args):
        for module in model.modules():
            module._modules.pop("rotary_emb", None)
        original(model, *args)

    monkeypatch.setattr(attention_inputs, "install", install)
    with (
        pytest.raises(KVCompressionError, match=r"(?s)qkv_proj and rotary_emb.*such as bacon"),
        engine(checkpoint("llama", layers=2), Method("shiftkv", 96)),
    ):
        pass


def test_head_scores_of_another_model(checkpoint, tmp_path):
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({f"{i // 4}-{i % 4}": [1.0] for i in range(12)}))
    with (
        pytest.raises(
            KVCompressionError,
            match=r"3 layers x 4 query heads, the model has 2 x 8; .*calibrate-heads",
        ),
        engine(
            checkpoint("llama", layers=2),
            Method("snapkv+sparsemm", 96, options=(("head_scores", str(file)),)),
        ),
    ):
        pass


def test_streaming_sessions(checkpoint):
    """Prompts that grow later are refused request by request."""
    with engine(checkpoint("llama"), Method("bacon", 96)) as llm:
        processor = llm.llm_engine.input_processor
        arguments = ("r", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(), ("generate",))
        with pytest.raises(KVCompressionError, match="streaming-input session"):
            processor.process_inputs(*arguments, resumable=True)
        assert processor.process_inputs(*arguments).request_id == "r"


def test_inert(checkpoint):
    """Installed but not asked for: stock classes everywhere, and the text of vLLM without us."""
    prompts = [random_prompt(length, seed=3) for length in (333, 40)]
    with engine(checkpoint("llama")) as llm:
        runner = model_runner(llm)
        for layer in runner.compilation_config.static_forward_context.values():
            assert type(layer.impl) is CPUAttentionBackendImpl
        (group,) = runner.attn_groups[0]
        assert type(group.metadata_builders[0]) is CPUAttentionMetadataBuilder
        assert type(group.kv_cache_spec) is FullAttentionSpec
        (manager,) = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
        assert type(manager) is FullAttentionManager
        assert type(scheduler_of(llm)) is Scheduler
        with pytest.raises(AttributeError):
            compressed_layers(llm)
        answers = generate(llm, prompts)
    code = f"""
import json, sys
from engine import engine, generate, random_prompt
prompts = [random_prompt(length, seed=3) for length in (333, 40)]
import vllm.plugins
with engine({checkpoint("llama")!r}) as llm:
    answers = generate(llm, prompts)
from vllm.engine.arg_utils import EngineArgs
assert not hasattr(EngineArgs.create_engine_config, "__vllm_kvcompress__")
print(json.dumps([[a.token_ids, a.logprobs] for a in answers]))
"""
    without = result_of(run_python(code, VLLM_PLUGINS=""))
    assert_same(
        answers, [SimpleNamespace(token_ids=tokens, logprobs=lp) for tokens, lp in without], 0.0
    )


START = """
from engine import Method, engine, generate, random_prompt
with engine({model!r}, Method("bacon", 96){settings}) as llm:
    print(generate(llm, [random_prompt(300, seed=1)])[0].token_ids)
"""


def test_worker_without_the_plugin_cannot_start(checkpoint):
    """The worker's half is broken: no engine, rather than one that does not compress."""
    failed = run_python(
        START.format(model=checkpoint("llama"), settings=""),
        PYTHONPATH=str(HERE / "broken_plugin"),
        BROKEN_MODULE="vllm_kvcompress.adapter.worker",
    )
    assert failed.returncode != 0
    assert "vllm_kvcompress.adapter.worker is broken in this test" in failed.stderr


def test_broken_plugin_cannot_start(checkpoint):
    """What the plugin needs at start is broken: vLLM must not go on without it."""
    failed = run_python(
        START.format(model=checkpoint("llama"), settings=""),
        PYTHONPATH=str(HERE / "broken_plugin"),
        BROKEN_MODULE="vllm_kvcompress.adapter.selection",
    )
    assert failed.returncode != 0
    assert "vllm_kvcompress.adapter.selection is broken in this test" in failed.stderr


class WorkerExtension:
    """A user's own, named by path in test_own_worker_extension."""

    def greet(self) -> str:
        return "hello"


def test_own_worker_extension(checkpoint):
    """--worker-extension-cls is the user's: compression does not depend on ours being loaded."""
    model = checkpoint("llama")
    code = f"""
import json
from engine import Method, engine, generate, random_prompt
from oracle import Oracle, OracleConfig
prompt = random_prompt(300, seed=1)
with engine(
    {model!r}, Method("bacon", 96), worker_extension_cls="test_refusals.WorkerExtension"
) as llm:
    assert llm.collective_rpc("greet") == ["hello"]
    ours = generate(llm, [prompt])[0].token_ids
print(json.dumps([ours, Oracle({model!r}).generate(
    prompt, 8, OracleConfig(budget=96, scorer="bacon")).token_ids]))
"""
    ours, oracle = result_of(run_python(code))
    assert ours == oracle


def test_grids_that_the_scheduler_does_not_see(checkpoint):
    """Shared memory brings processed images to workers only."""
    plus = {"method": "bacon-plus", "budget": 64}
    shared = {"mm_processor_cache_type": "shm"}
    with pytest.raises(KVCompressionError, match="set --mm-processor-cache-type lru") as refusal:
        configure(checkpoint("qwen2-vl"), plus, **shared)
    assert "bacon-plus pools along the grids of images" in str(refusal.value)
    configure(checkpoint("qwen2-vl"), plus | {"grid": False}, **shared)
    configure(checkpoint("qwen2-vl"), plus)
