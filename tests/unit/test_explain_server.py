# SPDX-License-Identifier: Apache-2.0
"""Asking a server how it compresses: which calls it gets, and what is said when it knows none."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vllm_kvcompress.tools import explain_server

MESSAGES = [{"role": "user", "content": "?"}]


class StandIn(BaseHTTPRequestHandler):
    """Answers from ``replies`` [path -> (status, body)] and writes down what it is asked."""

    replies: dict
    calls: list

    def answer(self, body: dict | None) -> None:
        key = self.path if body is None or "method" not in body else body["method"]
        self.calls.append((key, body, self.headers.get("X-Request-Id")))
        status, reply = self.replies.get(key, (404, {}))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    """``server(replies)``: address and the calls so far."""
    running = []

    def start(replies: dict) -> tuple[str, list]:
        calls: list = []
        handler = type("Handler", (StandIn,), {"replies": replies, "calls": calls})
        listening = HTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        running.append(listening)
        return f"http://127.0.0.1:{listening.server_port}/", calls

    yield start
    for listening in running:
        listening.shutdown()
        listening.server_close()


REPLIES = {
    "/v1/models": (200, {"data": [{"id": "served", "root": "some/checkpoint"}]}),
    "/v1/chat/completions": (200, {"choices": [{"message": {"content": "42"}}]}),
    "kv_compression_record": (200, {"results": [None]}),
    "kv_compression_recorded": (200, {"results": [{"length": 7}, None]}),
}


def test_calls(server):
    address, calls = server(REPLIES)
    reply = explain_server.ask(address, MESSAGES, 5)
    assert reply == ("42", [{"length": 7}, None], "some/checkpoint")
    expected = ["kv_compression_record", "/v1/chat/completions", "kv_compression_recorded"]
    assert [name for name, _, _ in calls] == ["/v1/models", *expected]
    (request_id,) = calls[1][1]["args"]
    # as vLLM names the requests of this endpoint
    assert request_id == f"chatcmpl-{calls[2][2]}"
    assert calls[2][1] == {
        "model": "served", "messages": MESSAGES, "temperature": 0, "max_tokens": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "message"), [(404, "has no /collective_rpc"), (500, "workers do not know it")]
)
def test_a_server_that_was_not_started_for_it(server, status, message):
    address, calls = server(REPLIES | {"kv_compression_record": (status, {})})
    with pytest.raises(ValueError, match=message) as caught:
        explain_server.ask(address, MESSAGES, 5)
    assert "VLLM_SERVER_DEV_MODE=1" in str(caught.value)
    assert "RecordingExtension" in str(caught.value)
    assert len(calls) == 2, "the question was asked in vain"


def test_it_does_not_go_on_recording(server):
    address, calls = server(REPLIES | {"/v1/chat/completions": (400, {})})
    with pytest.raises(OSError, match="400"):
        explain_server.ask(address, MESSAGES, 5)
    assert calls[-1][0] == "kv_compression_recorded"
