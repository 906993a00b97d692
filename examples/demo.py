# SPDX-License-Identifier: Apache-2.0
"""Serve the tiny model with compression, ask it about pages, show what was kept.

    make demo

Exits with 0 only if every answer is right, the server says that it compresses, and its metrics show
dropped tokens and returned blocks. Needs nothing but the environment that vLLM runs in.
"""

import argparse
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

EXAMPLE = Path(__file__).resolve().parent / "tiny-docvqa"
BANNER = "KV compression is on"
METRIC = "vllm:kv_compression_"
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 30

# a proxy of the environment has no business between two processes of this machine
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class DemoError(Exception):
    """Something is not as it should be; the message says what."""


class Page(NamedTuple):
    """A page on disk and a question about it."""

    image: Path
    question: str
    answer: str


def draw_pages(folder: Path, seed: int, count: int) -> list[Page]:
    """Run the page generator of the example."""
    command = [sys.executable, EXAMPLE / "pages.py", "--out", folder]
    subprocess.run([*command, "--seed", str(seed), "--count", str(count)], check=True)
    entries = json.loads((folder / "questions.json").read_text())
    return [Page(folder / entry["image"], entry["question"], entry["answer"]) for entry in entries]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(arguments: list[str], log: Path) -> Iterator[str]:
    """Run ``vllm serve`` in a process group of its own; yields its address when it is ready.

    However the block is left, every process of the group has ended afterwards.
    """
    port = free_port()
    # the script beside this interpreter, so that it need not be on PATH
    command = [os.path.relpath(Path(sys.executable).with_name("vllm")), "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    print("$", *command, flush=True)
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **OFFLINE},
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(process, address)
        yield address
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen, address: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the server ended early, with status {process.returncode}")
        with contextlib.suppress(OSError), _open(f"{address}/health", timeout=2):
            return
        time.sleep(0.5)
    raise DemoError(f"the server was not ready after {START_TIMEOUT_S} s")


def stop(process: subprocess.Popen) -> None:
    """Ask politely, then end what is left of the group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ask(address: str, page: Page) -> str:
    """Send the page and its question to the OpenAI chat endpoint; greedy decoding."""
    png = base64.b64encode(page.image.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    text = {"type": "text", "text": page.question}
    body = {
        "model": "tiny-docvqa",
        "messages": [{"role": "user", "content": [image, text]}],
        "temperature": 0,
        "max_tokens": 8,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with _open(request, timeout=120) as response:
            return json.load(response)["choices"][0]["message"]["content"].strip()
    except urllib.error.HTTPError as error:
        raise DemoError(f"the request failed: {error.code} {error.read().decode()}") from error


def read_metrics(address: str) -> dict[str, int]:
    """The counters of this plugin on vLLM's own /metrics, over all engines.

    Names are without the prefix, and followed by the label that tells kinds of events apart.
    """
    with _open(f"{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: dict[str, int] = {}
    for name, labels, value in re.findall(rf"^{METRIC}(\w+){{(.*)}} (\S+)$", text, re.MULTILINE):
        key = " ".join([name, *re.findall(r'(?:outcome|when)="(\w+)"', labels)])
        found[key] = found.get(key, 0) + round(float(value))
    return found


def check(log: Path, pages: list[Page], answers: list[str], metrics: dict[str, int]) -> list[str]:
    """Everything that is off, in sentences."""
    problems = [
        f"{page.image.name}: the answer is {answer!r}, expected {page.answer!r}"
        for page, answer in zip(pages, answers, strict=True)
        if answer != page.answer
    ]
    requests = metrics.get("requests_total compressed")
    kept, seen = metrics.get("kept_tokens_total", 0), metrics.get("prompt_tokens_total", 0)
    before = metrics.get("request_blocks_total before", 0)
    after = metrics.get("request_blocks_total after", 0)
    checks = (
        (BANNER in log.read_text(), f"the server's log lacks the line {BANNER!r}"),
        (requests == len(pages), f"{requests} of {len(pages)} requests were compressed"),
        (0 < kept < seen, f"{kept} of {seen} prompt tokens were kept"),
        (0 < after < before, f"{before} blocks were held before compression and {after} after"),
        (metrics.get("blocks_freed_total", 0) > 0, "no block went back to the pool"),
    )
    return problems + [problem for fine, problem in checks if not fine]


def run(args: argparse.Namespace, serve_arguments: list[str]) -> list[str]:
    """The whole demo; returns what was off."""
    pages = draw_pages(args.out, args.seed, args.count)
    log = args.out / "server.log"
    arguments = [os.path.relpath(EXAMPLE / "model"), "--served-model-name", "tiny-docvqa"]
    arguments += ["--kv-compression", args.method, "--kv-budget", args.budget]
    # small numbers: vLLM would reserve most of the memory for the cache, and compile for a minute
    arguments += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "8"]
    arguments += ["--enforce-eager", *serve_arguments]
    answers = []
    with server(arguments, log) as address:
        for page in pages:
            answers.append(ask(address, page))
            print(f"image                {page.image}")
            print(f"question             {page.question}")
            print(f"answer               {answers[-1]}  (expected: {page.answer})")
        metrics = read_metrics(address)

    def shown(name: str) -> str:
        return str(metrics.get(name, "missing"))

    print(
        f"prompt tokens kept   {shown('kept_tokens_total')} of {shown('prompt_tokens_total')} "
        "per KV head"
    )
    before = shown("request_blocks_total before")
    after = shown("request_blocks_total after")
    freed = shown("blocks_freed_total")
    print(f"KV blocks held       {before} before compression, {after} after; {freed} went back")
    return check(log, pages, answers, metrics)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Ask a compressed server about a page. Further flags go to `vllm serve`."
    )
    parser.add_argument("--method", default="bacon", help="value of --kv-compression")
    parser.add_argument("--budget", default="64", help="value of --kv-budget")
    parser.add_argument("--seed", type=int, default=0, help="the first page")
    parser.add_argument("--count", type=int, default=1, help="how many pages")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/demo"), help="folder for the page and the log"
    )
    args, serve_arguments = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)

    # so that `finally` runs when somebody else ends this process, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        problems = run(args, serve_arguments)
    except DemoError as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        print("interrupted; the server has been stopped", file=sys.stderr)
        return 130
    if problems:
        print("\nThe demo failed:", *problems, sep="\n  - ", file=sys.stderr)
        log = args.out / "server.log"
        if log.exists():
            print(f"\nThe server's log, {log}, ends with:", file=sys.stderr)
            print(*log.read_text().splitlines()[-12:], sep="\n", file=sys.stderr)
        return 1
    print("The demo passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
