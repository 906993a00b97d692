# SPDX-License-Identifier: Apache-2.0
"""aircache: visual tokens as the text rows see them that matter to the last one."""

from __future__ import annotations

import numpy as np

from oracle.attention import logits_of, softmax
from oracle.prompt import Prompt


def elite_importance(
    prompt: Prompt, layer: int, elite: float, scope: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """I [Hq, P], zero on text, and the elite rows X* of every query head.

    Both softmaxes are over subsets of the keys: the text behind the last visual token, and the
    visual tokens together with the elite rows.
    """
    text = prompt.instruction_len()
    if text is None:
        text = np.array([prompt.length - 1])
    heads = range(prompt.num_q)
    logits = [logits_of(prompt, layer, head, text) for head in heads]
    seen = np.stack([softmax(logits[head][-1, text]) for head in heads])  # [Hq, N_t]
    if scope == "layer":
        seen = np.tile(seen.mean(axis=0), (prompt.num_q, 1))

    importance = np.zeros((prompt.num_q, prompt.length))
    chosen = []
    for head in heads:
        best = seen[head] >= elite * seen[head].max()
        columns = np.union1d(np.flatnonzero(prompt.visual), text[best])
        weights = np.zeros(prompt.length)
        weights[columns] = softmax(logits[head][best][:, columns]).mean(axis=0)
        importance[head] = np.where(prompt.visual, weights, 0.0)
        chosen.append(text[best])
    return importance, chosen
