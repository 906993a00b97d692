# SPDX-License-Identifier: Apache-2.0
"""How many drafts are accepted, with and without compression.

    python -P benchmarks/speculation.py

Drafts are n-grams of prompt and answer. Prompts are pages of the example model, whose answers go on
past the code: repetitive text, as n-grams need it. Every row is an engine of its own.
"""

import os
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-docvqa"
PAGES = 24
OUTPUT_TOKENS = 64
SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
BUDGETS = (None, 256, 128, 64)


def serve(budget: int | None) -> tuple[int, int, int]:
    """Draft tokens, those of them that were accepted, and all output tokens."""
    from vllm import LLM, SamplingParams

    compression = {"method": "bacon", "budget": budget}
    llm = LLM(
        str(EXAMPLE / "model"),
        additional_config={} if budget is None else {"kv_compression": compression},
        speculative_config=SPECULATION,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
    )
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    values = {metric.name: metric for metric in llm.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens")
    drafts, accepted = (int(values[f"vllm:spec_decode_{name}"].value) for name in names)
    llm.llm_engine.engine_core.shutdown()
    return drafts, accepted, sum(len(output.outputs[0].token_ids) for output in outputs)


def prompts() -> list[dict]:
    sys.path.append(str(EXAMPLE))
    from pages import make_page

    head, tail = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n"
    pages = [make_page(seed) for seed in range(PAGES)]
    return [
        {
            "prompt": f"{head}{page.question}{tail}<|im_start|>assistant\n",
            "multi_modal_data": {"image": page.image},
        }
        for page in pages
    ]


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print("| budget | draft tokens | accepted | output tokens per verification |")
    print("|---|---|---|---|")
    for budget in BUDGETS:
        drafts, accepted, tokens = serve(budget)
        steps = tokens - accepted  # each verification, and each step without drafts, adds one more
        name = "none" if budget is None else str(budget)
        print(f"| {name} | {drafts} | {accepted / drafts:.0%} | {tokens / steps:.2f} |", flush=True)


if __name__ == "__main__":
    main()
