# SPDX-License-Identifier: Apache-2.0
"""One chat question to a running server that was started to say how it compresses."""

import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TIMEOUT_S = 600.0

HOW_TO_START = (
    "start it with the environment variable VLLM_SERVER_DEV_MODE=1 and the flags --kv-compression "
    "METHOD --worker-extension-cls vllm_kvcompress.adapter.recorder.RecordingExtension, on an "
    "address that only you can reach: whoever reaches such a server controls its workers"
)


class Reply(NamedTuple):
    """What came back.

    Attributes:
        text: the answer.
        reports: what each worker says of the compression.
        checkpoint: folder or name of what the server serves.
    """

    text: str
    reports: list[Mapping[str, Any] | None]
    checkpoint: str


def ask(address: str, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Reply:
    """Ask greedily, through vLLM's own endpoints; other requests are served meanwhile.

    Raises:
        ValueError: the server says nothing about how it compresses.
        OSError: it does not answer.
    """
    address = address.rstrip("/")
    card = _call(f"{address}/v1/models")["data"][0]
    name = f"explain-{uuid.uuid4().hex}"
    _rpc(address, "kv_compression_record", f"chatcmpl-{name}")
    try:
        body = {
            "model": card["id"],
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        answer = _call(f"{address}/v1/chat/completions", body, {"X-Request-Id": name})
    finally:  # it must not go on recording
        reports = _rpc(address, "kv_compression_recorded")
    text = answer["choices"][0]["message"]["content"]
    return Reply(text, reports, card["root"])


def _rpc(address: str, method: str, *arguments: str) -> list[Mapping[str, Any] | None]:
    """Call a method of every worker."""
    try:
        results = _call(f"{address}/collective_rpc", {"method": method, "args": arguments})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            reason = "has no /collective_rpc"
        else:
            reason = f"answers {method} with {error.code}, so its workers do not know it"
        raise ValueError(f"the server at {address} {reason}: {HOW_TO_START}") from error
    return results["results"]


def _call(
    url: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """GET, or POST with a body; the JSON that comes back."""
    request = urllib.request.Request(
        url,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return json.load(response)
