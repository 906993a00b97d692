# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given answers, by the float32 model of Transformers on the CPU."""

from collections.abc import Sequence

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "kept_only"


class ForcedModel:
    """One pass over prompt and answer; what each head has evicted is hidden from the answer.

    Forcing the answer compares every token of it under the same context, also behind the first
    near tie, from which on a greedy decoder would write another text.
    """

    def __init__(self, model_dir: str) -> None:
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attend)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.model.config._attn_implementation = NAME
        self._prompt_len = 0
        self._evicted: list[torch.Tensor] | None = None  # [L] of [Hkv, P]

    def _attend(self, module, query, key, value, attention_mask, scaling, **_):
        """Causal attention; query [1, Hq, T, D], key and value [1, Hkv, T, D]."""
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
        if self._evicted is not None:
            evicted = self._evicted[module.layer_idx].repeat_interleave(group, dim=0)  # [Hq, P]
            hidden = hidden.repeat(query.shape[1], 1, 1)
            hidden[:, self._prompt_len :, : self._prompt_len] |= evicted[:, None]
        logits = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scaling
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        result = weights @ value.repeat_interleave(group, dim=1)
        return result.transpose(1, 2).contiguous(), weights

    @torch.inference_mode()
    def logprobs(
        self, prompt: Sequence[int], answer: Sequence[int], kept: Sequence | None
    ) -> torch.Tensor:
        """Of each answer token, given the prompt and the tokens before it. [tokens] float32.

        Args:
            kept: [L][Hkv] prompt positions that the answer's tokens may see; None: all.
        """
        self._prompt_len, self._evicted = len(prompt), None
        if kept is not None:
            evicted = torch.ones(len(kept), len(kept[0]), len(prompt), dtype=torch.bool)
            for layer, heads in enumerate(kept):
                for head, positions in enumerate(heads):
                    evicted[layer, head, torch.as_tensor(positions)] = False
            self._evicted = list(evicted)
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        tokens = torch.tensor(answer)[:, None]
        return logits.log_softmax(-1).gather(1, tokens)[:, 0]
