# SPDX-License-Identifier: Apache-2.0
"""The real ``vllm serve`` in a process of its own."""

import base64
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from vllm_kvcompress.config import SERVER_DIR_VARIABLE

VLLM = str(Path(sys.executable).with_name("vllm"))
DEADLINE_S = 240.0


def environment(**extra: str) -> dict[str, str]:
    """Of an ordinary user: engine in its own process, normal log."""
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING", SERVER_DIR_VARIABLE}  # of engines in this process
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    return inherited | {"VLLM_LOGGING_LEVEL": "INFO"} | extra


def arguments(model: str, *extra: str) -> list[str]:
    return [
        VLLM, "serve", model, "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M", *extra,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running ``vllm serve`` and its log."""

    def __init__(self, model: str, *extra: str, **extra_environment: str) -> None:
        self.port = free_port()
        self.model = model
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            arguments(model, "--port", str(self.port), *extra),
            env=environment(**extra_environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self.lines.append("")  # the end
            self._news.notify_all()

    def wait_for(self, text: str) -> str:
        """The first log line with ``text``."""

        def found():
            hits = [line for line in self.lines if text in line]
            return hits or (self.lines and self.lines[-1] == "")

        with self._news:
            assert self._news.wait_for(found, DEADLINE_S), f"no {text!r} in time:\n{self.log}"
        hits = [line for line in self.lines if text in line]
        assert hits, f"the server ended without {text!r}:\n{self.log}"
        return hits[0]

    def wait_until_ready(self) -> None:
        """Requests are answered from now on: uvicorn says so a moment too early."""
        self.wait_for("Application startup complete")
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, self.log
                time.sleep(0.1)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def request(self, method: str, path: str, body: dict | None = None, **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        connection.request(
            method,
            path,
            json.dumps(body) if body is not None else None,
            {"Content-Type": "application/json"} | headers,
        )
        return connection, connection.getresponse()

    def chat(self, page, **settings) -> dict:
        connection, response = self.request("POST", "/v1/chat/completions", body(page, **settings))
        answer = json.loads(response.read())
        connection.close()
        assert response.status == 200, answer
        return answer

    def metrics_text(self) -> str:
        """What a scrape gets."""
        connection, response = self.request("GET", "/metrics")
        text = response.read().decode()
        connection.close()
        return text

    def metrics(self) -> dict[str, float]:
        """Sample name with labels -> value, the engine's labels left out."""
        values: dict[str, float] = {}
        for line in self.metrics_text().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r'(engine|model_name)="[^"]*",?', "", name)
                name = name.replace(",}", "}").replace("{}", "")
                values[name] = values.get(name, 0) + float(value)
        return values


def body(page, **settings) -> dict:
    stream = io.BytesIO()
    page.image.save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": page.question},
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    } | settings


def ends_with_error(model: str, *extra: str, **extra_environment: str) -> str:
    """Output of a server that must not start."""
    done = subprocess.run(
        arguments(model, "--port", str(free_port()), *extra),
        env=environment(**extra_environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert "Application startup complete" not in output
    return output
