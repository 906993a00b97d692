# SPDX-License-Identifier: Apache-2.0
"""Plays the GPU for tests of the scheduler's side: knows which token every cache slot holds.

Whatever attention would read must be there. A block that was freed too soon, shared after
compaction, or hit under a wrong hash shows at the step that reads it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput

from vllm_kvcompress.orders import ATTRIBUTE, CompressionOrder
from vllm_kvcompress.plan import PromptPlan


@dataclass
class GhostRequest:
    """What the worker knows of a request.

    Attributes:
        tables: per group; freed ids stay, as in the real worker.
        prefix: hash of the tokens up to each position.
        compressed: whether its prompt has been compressed, in its present life.
        boundary: logical length when it was compressed first.
    """

    tokens: list[int]
    prompt_len: int
    tables: list[list[int]]
    prefix: list[int] = field(default_factory=list)
    compressed: bool = False
    boundary: int | None = None

    def extend_prefix(self) -> None:
        last = self.prefix[-1] if self.prefix else 0
        for token in self.tokens[len(self.prefix) :]:
            last = hash((last, token))
            self.prefix.append(last)


class Ghost:
    """A worker whose KV cache holds prefix hashes instead of keys and values.

    Args:
        plan_of: plan of a request, by its id and the length of its prompt; the first cache group
            is compacted by it.
        block_size, num_blocks: of the pool.
        sliding: window of the other groups, in tokens.
    """

    def __init__(
        self,
        plan_of: Callable[[str, int], PromptPlan],
        block_size: int,
        num_blocks: int,
        sliding: int,
    ) -> None:
        self.plan_of = plan_of
        self.block_size = block_size
        self.sliding = sliding
        self.slots: list = [None] * (num_blocks * self.block_size)
        self.requests: dict[str, GhostRequest] = {}

    def run(self, output) -> ModelRunnerOutput:
        for req_id in itertools.chain(output.finished_req_ids, output.preempted_req_ids or ()):
            known = self.requests.get(req_id)
            if known is not None:
                known.tables = [[] for _ in known.tables]
                known.compressed = False
        orders = vars(output)[ATTRIBUTE]
        for order in orders.compress:
            if self.requests[order.req_id].tables[0]:  # else it has left
                self.compress(order)
        computed = {}
        for new in output.scheduled_new_reqs:
            tables = [list(ids) for ids in new.block_ids]
            tokens = list(new.prompt_token_ids)
            self.requests[new.req_id] = GhostRequest(tokens, len(tokens), tables)
            computed[new.req_id] = new.num_computed_tokens
            self.check_hit(new.req_id, new.num_computed_tokens)
            plan = self.plan(new.req_id)
            assert (new.req_id in orders.plans) == plan.compresses
        cached = output.scheduled_cached_reqs
        for index, req_id in enumerate(cached.req_ids):
            known = self.requests[req_id]
            ids = cached.new_block_ids[index]
            if req_id in cached.resumed_req_ids:
                known.tables = [list(group) for group in ids]
                assert not known.compressed
                # what was sampled and then dropped will be sampled again
                del known.tokens[known.prompt_len + cached.num_output_tokens[index] :]
                del known.prefix[len(known.tokens) :]
                self.check_hit(req_id, cached.num_computed_tokens[index])
            elif ids is not None:
                for table, group in zip(known.tables, ids, strict=True):
                    table += group
            computed[req_id] = cached.num_computed_tokens[index]
        req_ids = list(output.num_scheduled_tokens)
        rows = [(r, computed[r], output.num_scheduled_tokens[r]) for r in req_ids]
        # like a layer: everything is written, then read
        for row in rows:
            self.write(*row)
        for row in rows:
            self.attend(*row)
        sampled = [self.sample(*row) for row in rows]
        for req_id in output.finished_req_ids:
            if req_id not in output.num_scheduled_tokens:
                self.requests.pop(req_id, None)
        return ModelRunnerOutput(req_ids, {r: i for i, r in enumerate(req_ids)}, sampled)

    def plan(self, req_id: str) -> PromptPlan:
        return self.plan_of(req_id, self.requests[req_id].prompt_len)

    def check_hit(self, req_id: str, num_hit: int) -> None:
        plan = self.plan(req_id)
        assert not plan.compresses or num_hit <= plan.max_hit, "a hit beyond max_hit"

    def slot_ids(self, table: list[int], start: int, end: int) -> list[int]:
        """Where positions [start, end) of a request lie."""
        size = self.block_size
        return [table[position // size] * size + position % size for position in range(start, end)]

    def write(self, req_id: str, start: int, count: int) -> None:
        known = self.requests[req_id]
        known.extend_prefix()
        for table in known.tables:
            for position, slot in enumerate(self.slot_ids(table, start, start + count), start):
                self.slots[slot] = known.prefix[position]

    def compress(self, order: CompressionOrder) -> None:
        """Read the whole prompt, then write its kept blocks."""
        known, plan = self.requests[order.req_id], order.plan
        assert plan == self.plan(order.req_id)
        assert plan.compresses
        assert not known.compressed, "compressed twice"
        self.check_uncompressed(order.req_id, order.block_ids, 0, known.prompt_len)
        for slot in self.kept_slots(order.req_id):
            self.slots[slot] = ("compacted", order.req_id, slot)
        known.compressed = True

    def kept_slots(self, req_id: str) -> list[int]:
        plan, size = self.plan(req_id), self.block_size
        first, end = plan.num_freed_blocks * size, plan.num_full_blocks * size
        return self.slot_ids(self.requests[req_id].tables[0], first, end)

    def attend(self, req_id: str, start: int, count: int) -> None:
        known = self.requests[req_id]
        full, end = known.tables[0], start + count
        for table in known.tables[1:]:
            self.check_uncompressed(req_id, table, max(0, start - self.sliding + 1), end)
        plan = self.plan(req_id)
        if not known.compressed:
            if known.boundary is not None:
                assert end <= known.boundary, "a replay goes on uncompressed"
            if plan.config.when.always and plan.compresses:
                assert end <= known.prompt_len, "outputs came before the compression"
            self.check_uncompressed(req_id, full, 0, end)
            return
        assert start >= known.prompt_len
        if known.boundary is None:
            known.boundary = start
        assert start >= known.boundary, "a replay was compressed earlier than before"
        for slot in self.kept_slots(req_id):
            assert self.slots[slot] == ("compacted", req_id, slot), f"{req_id} lost a kept block"
        self.check_uncompressed(req_id, full, plan.num_full_blocks * self.block_size, end)

    def check_uncompressed(self, req_id: str, table: list[int], start: int, end: int) -> None:
        """Positions [start, end) hold what stock vLLM would have there."""
        held = [self.slots[slot] for slot in self.slot_ids(table, start, end)]
        assert held == self.requests[req_id].prefix[start:end], f"{req_id} reads foreign tokens"

    def sample(self, req_id: str, start: int, count: int) -> list[int]:
        known = self.requests[req_id]
        if start + count < len(known.tokens):
            return []
        token = known.prefix[-1] % 50
        known.tokens.append(token)
        return [token]
