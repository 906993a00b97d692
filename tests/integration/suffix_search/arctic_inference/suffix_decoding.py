# SPDX-License-Identifier: Apache-2.0
"""The part of Arctic Inference that vLLM asks for drafts, by plain search instead of trees."""

from types import SimpleNamespace


class SuffixDecodingCache:
    """Drafts what followed the longest known copy of a text's last tokens."""

    def __init__(self, max_tree_depth: int, max_cached_requests: int) -> None:
        self._texts: dict[str, list[int]] = {}
        self._active: set[str] = set()

    @property
    def active_requests(self) -> set[str]:
        return set(self._active)

    @property
    def cached_requests(self) -> set[str]:
        return set(self._texts)

    def start_request(self, req_id, prompt_token_ids) -> None:
        self._texts[req_id] = list(prompt_token_ids)
        self._active.add(req_id)

    def add_active_response(self, req_id, token_ids) -> None:
        self._texts[req_id] += list(token_ids)

    def stop_request(self, req_id) -> None:
        self._active.discard(req_id)

    def evict_cached_response(self, req_id) -> None:
        del self._texts[req_id]

    def speculate(
        self, req_id, pattern, max_spec_tokens: int, max_spec_factor: float, min_token_prob: float
    ) -> SimpleNamespace:
        pattern = list(pattern)
        for length in range(min(len(pattern), 8), 0, -1):
            suffix = pattern[-length:]
            most = min(max_spec_tokens, int(length * max_spec_factor))
            for text in reversed(list(self._texts.values())):
                for end in range(len(text) - 1, length - 1, -1):
                    if text[end - length : end] == suffix:
                        return SimpleNamespace(token_ids=text[end : end + most])
        return SimpleNamespace(token_ids=[])
