# SPDX-License-Identifier: Apache-2.0
"""An engine that answers questions under one method after the other.

vLLM takes the settings of a compression at its start and hands them to its worker and to the
manager of compressed blocks. Both are changed here between two batches, so that one engine serves a
whole sweep; prefix caching then spares most of the prefill of a prompt that was asked before.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

FORCED = "kvcompress_forced"
"""Key in ``SamplingParams.extra_args``: number and token ids of the answer to force."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_seen: dict[int, list[np.ndarray]] = {}
"""Log-probabilities of all tokens at each step of the forced answers, by number."""


class Settings(NamedTuple):
    """Of the engine."""

    model: str
    dtype: str = "float32"
    max_images: int = 0
    max_model_len: int = 1024
    cache_mib: int = 256
    threads: int = 1


class Asked(NamedTuple):
    """What became of one question.

    Attributes:
        text: the greedy answer.
        token_ids: of it.
        kept: prompt tokens that a KV head keeps, mean of those asked together.
    """

    text: str
    token_ids: list[int]
    kept: float


class Likelihood(NamedTuple):
    """How likely a given answer is, means over its tokens.

    Attributes:
        logprob: in nats.
        divergence: Kullback-Leibler divergence from the uncompressed model's prediction to this
            one, in nats. The first token is predicted before any compression and does not count.
    """

    logprob: float
    divergence: float


def likelihood(tokens: Sequence[int], seen: np.ndarray, whole: np.ndarray) -> Likelihood:
    """Of an answer's tokens.

    Args:
        tokens: of the answer.
        seen: log-probabilities under compression, [tokens, vocabulary].
        whole: the same of the uncompressed model.
    """
    logprob = float(seen[np.arange(len(tokens)), list(tokens)].mean())
    if len(tokens) == 1:
        return Likelihood(logprob, 0.0)
    rows = (np.exp(whole[1:]) * (whole[1:] - seen[1:])).sum(-1)
    return Likelihood(logprob, float(rows.mean()))


def make_forcing() -> type:
    """A logits processor, which vLLM wants as a class."""
    import torch
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forcing(AdapterLogitsProcessor):
        """Lets a request say only what it was given, and writes down what it would have said."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            if not (given := (params.extra_args or {}).get(FORCED)):
                return None
            number, tokens = given

            def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
                _seen.setdefault(number, []).append(logits.float().log_softmax(-1).numpy().copy())
                forced = torch.full_like(logits, float("-inf"))
                forced[tokens[len(output_ids)]] = 0
                return forced

            return force

    return Forcing


class Sweeper:
    """One engine for all methods, in this process."""

    def __init__(self, settings: Settings) -> None:
        os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(settings.threads))
        from vllm import LLM

        from accuracy import controls

        controls.register()
        # hooks for attention inputs are set at the start, where the method asks for them
        first = {"method": "shiftkv", "budget": 64}
        self.llm = LLM(
            settings.model,
            dtype=settings.dtype,
            additional_config={"kv_compression": first},
            logits_processors=[make_forcing()],
            enforce_eager=True,
            block_size=32,
            max_model_len=settings.max_model_len,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=settings.cache_mib << 20,
            limit_mm_per_prompt={"image": settings.max_images, "video": 0},
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        engine = self.llm.llm_engine
        self.manager = engine.engine_core.engine_core.scheduler.kv_cache_manager.compressed
        self.layers = engine.model_executor.driver_worker.worker.compressed_layers
        self.tokenizer = engine.get_tokenizer()

    def use(self, compression: dict[str, Any] | None) -> None:
        """Compress by these settings from now on; None: keep every prompt whole."""
        from vllm_kvcompress.config import KVCompressionConfig

        config = KVCompressionConfig.parse(compression or {"method": "streaming", "budget": "100%"})
        planner = replace(self.layers.planner, config=config)
        self.layers.configure(planner)
        self.manager.configure(planner)

    def ask(
        self, prompts: Sequence[Any], max_tokens: int, forced: Sequence[Sequence[int]] = ()
    ) -> tuple[list[Asked], list[np.ndarray]]:
        """Greedy answers; and of answers given for the same prompts, the log-probabilities.

        Args:
            prompts: as vLLM takes them.
            max_tokens: of a greedy answer.
            forced: token ids of one answer for each prompt, or nothing at all.

        Returns:
            The answers, and [tokens, vocabulary] for each forced one.
        """
        from vllm import SamplingParams

        before = self._counters()
        params = [SamplingParams(max_tokens=max_tokens, temperature=0) for _ in prompts]
        params += [
            SamplingParams(
                max_tokens=len(tokens),
                temperature=0,
                ignore_eos=True,
                extra_args={FORCED: (number, list(tokens))},
            )
            for number, tokens in enumerate(forced)
        ]
        _seen.clear()
        doubled = [*prompts, *prompts[: len(forced)]]
        outputs = self.llm.generate(doubled, params, use_tqdm=False)
        after = self._counters()
        gone, kept = (after[name] - before[name] for name in ("prompt_tokens", "kept_tokens"))
        # prompts that fit their budget are not counted: they keep every token
        total = sum(len(output.prompt_token_ids) for output in outputs)
        mean = (total - gone + kept) / len(outputs)
        answers = [
            Asked(output.outputs[0].text, list(output.outputs[0].token_ids), mean)
            for output in outputs[: len(prompts)]
        ]
        seen = [np.stack(_seen[number]) for number in range(len(forced))]
        for rows, tokens in zip(seen, forced, strict=True):
            assert len(rows) == len(tokens), "a request was computed twice: a larger cache, please"
        return answers, seen

    def _counters(self) -> dict[str, float]:
        from vllm_kvcompress.config import metrics_dir
        from vllm_kvcompress.metrics import totals

        directory = metrics_dir()
        assert directory is not None
        return totals(directory)
