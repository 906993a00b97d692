# SPDX-License-Identifier: Apache-2.0
"""The real ``vllm serve`` with our flags, over HTTP."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from servers import DEADLINE_S, Server, body, ends_with_error
from subprocesses import HERE

from vllm_kvcompress.adapter.recorder import EXTENSION
from vllm_kvcompress.tools import explain

BUDGET, BLOCK_SIZE = 128, 32


@pytest.fixture(scope="module")
def server(docvqa):
    running = Server(
        docvqa,
        "--kv-compression", "bacon", "--kv-budget", str(BUDGET), "--kv-window", "32",
        "--kv-compression-config", '{"kernel": 9}', "--worker-extension-cls", EXTENSION,
        "--kv-compression-allow", "off,budget,snapkv",
        VLLM_SERVER_DEV_MODE="1",
    )  # fmt: skip
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def pages(make_page):
    return [make_page(seed) for seed in range(1000, 1004)]


def requests(method: str, outcome: str) -> str:
    """Name of a counter without prefix."""
    return f'requests_total{{method="{method}",outcome="{outcome}"}}'


def test_answers_about_pages(server, pages):
    """The right code off a PNG, from a cache of a third of its tokens; metrics tell the same."""
    before = server.metrics()
    prompt_tokens = 0
    for page in pages:
        answer = server.chat(page)
        assert answer["choices"][0]["message"]["content"] == page.answer
        prompt_tokens += answer["usage"]["prompt_tokens"]
    after = server.metrics()

    def gained(name: str) -> float:
        name = "vllm:kv_compression_" + name
        return after[name] - before.get(name, 0)

    assert gained(requests("bacon+uniform", "compressed")) == len(pages)
    assert gained(requests("bacon+uniform", "kept_whole")) == 0
    assert gained("prompt_tokens_total") == prompt_tokens > 300 * len(pages)
    kept = gained("kept_tokens_total")
    assert BUDGET * len(pages) <= kept < (BUDGET + BLOCK_SIZE) * len(pages)
    held_before = gained('request_blocks_total{when="before"}')
    held_after = gained('request_blocks_total{when="after"}')
    assert held_before == sum(-(-prompt_tokens // len(pages) // BLOCK_SIZE) for _ in pages)
    assert gained("blocks_freed_total") == held_before - held_after > 6 * len(pages)
    assert gained("seconds_count") == len(pages)
    assert 0 < gained("seconds_sum") < 60
    assert gained('seconds_bucket{le="+Inf"}') == len(pages)


def test_explained(server, pages, docvqa, tmp_path):
    """The server says of one of its requests how it was compressed."""
    image = tmp_path / "page.png"
    pages[0].image.save(image)
    address = f"http://127.0.0.1:{server.port}"
    arguments = ["--server", address, "--image", str(image), "--question", pages[0].question]
    explained = explain.explain(explain.parser().parse_args(arguments))
    (column,) = explained.columns
    assert explained.model == docvqa
    assert column.answer.strip() == pages[0].answer
    assert column.title == f"bacon, budget {BUDGET} tokens, window 32"
    assert "kernel 9" in column.details
    kept = column.prompt.kept.sum(axis=2)
    assert (kept == kept[0, 0]).all()
    assert BUDGET <= kept[0, 0] < BUDGET + BLOCK_SIZE
    # where a digit is lost, the answer is too: at this budget some head keeps each of them
    assert explained.on_grid(column.prompt.kept).any(axis=(0, 1)).sum() > 100
    assert server.chat(pages[1])["choices"][0]["message"]["content"] == pages[1].answer


def test_short_prompt_is_kept_whole(server):
    before = server.metrics()
    connection, response = server.request(
        "POST", "/v1/completions", {"prompt": "a short one", "max_tokens": 4, "temperature": 0}
    )
    assert response.status == 200
    response.read()
    connection.close()
    name = "vllm:kv_compression_" + requests("bacon+uniform", "kept_whole")
    assert server.metrics()[name] - before[name] == 1


def told(kept_tokens: int, outcome: str, method: str, prompt_tokens: int) -> dict:
    report = {"method": method, "outcome": outcome, "prompt_tokens": prompt_tokens}
    return {"kv_compression": report | {"kept_tokens": kept_tokens}}


def test_requests_choose(server, pages):
    """By three endpoints, and each is told, and counted, by what it chose."""
    before = server.metrics()
    plain = server.chat(pages[0])
    length = plain["usage"]["prompt_tokens"]
    tail = length % BLOCK_SIZE
    assert plain["kv_transfer_params"] is None
    whole = server.chat(pages[0], vllm_xargs={"kv_compression": "off"})
    assert whole["kv_transfer_params"] == told(length, "kept_whole", "off", length)
    assert whole["choices"][0]["message"]["content"] == pages[0].answer
    small = server.chat(pages[0], vllm_xargs={"kv_budget": 64, "kv_compression": "snapkv"})
    kept = -(-(64 - tail) // BLOCK_SIZE) * BLOCK_SIZE + tail
    assert small["kv_transfer_params"] == told(kept, "compressed", "snapkv+uniform", length)
    prompt = {"prompt": "a prompt " * 40, "max_tokens": 4, "ignore_eos": True}
    xargs = {"vllm_xargs": {"kv_budget": "25%"}}
    completion = answered(server, "/v1/completions", prompt | xargs)
    assert completion["kv_transfer_params"]["kv_compression"]["outcome"] == "compressed"
    message = answered(server, "/v1/messages", anthropic(server, kv_compression="off"))
    assert message["kv_transfer_params"]["kv_compression"]["method"] == "off"
    after = server.metrics()
    for method, outcome, number in (
        ("bacon+uniform", "compressed", 2),  # the plain one, and the completion
        ("snapkv+uniform", "compressed", 1),
        ("off", "kept_whole", 2),
    ):
        name = "vllm:kv_compression_" + requests(method, outcome)
        assert after[name] - before[name] == number


def anthropic(server, **xargs) -> dict:
    text = [{"role": "user", "content": "what is on this page " * 8}]
    return {"model": server.model, "max_tokens": 4, "messages": text, "vllm_xargs": xargs}


def answered(server, path: str, request: dict, status: int = 200) -> dict:
    connection, response = server.request("POST", path, request)
    found = json.loads(response.read())
    connection.close()
    assert response.status == status, found
    return found


def test_bad_choices_get_400(server, pages):
    """On each endpoint, streamed or not, while others are served."""
    connection, response = server.request(
        "POST", "/v1/chat/completions", body(pages[1], stream=True, max_tokens=200, ignore_eos=True)
    )
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    name = "vllm:kv_compression_" + requests("none", "refused")
    before = server.metrics().get(name, 0)
    bad = (
        ({"kv_budget": 8}, "Nearest valid value: 33."),
        ({"kv_budget": "120%"}, "Nearest valid value: 100%."),
        ({"kv_compression": "h2o"}, "--kv-compression-allow off,budget,snapkv,h2o."),
        ({"kv_compression": "snapvk"}, "Nearest valid value: snapkv."),
        ({"kv_window": 16}, "Nearest valid value: 32."),
        ({"kv_bugdet": 64}, "Did you mean 'kv_budget'?"),
    )
    for xargs, expected in bad:
        chat = body(pages[0], vllm_xargs=xargs)
        prompt = {"prompt": "a short one", "max_tokens": 4, "vllm_xargs": xargs}
        for path, request in (
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"stream": True}),
            ("/v1/completions", prompt),
            ("/v1/completions", prompt | {"stream": True}),
            ("/v1/messages", anthropic(server, **xargs)),
        ):
            found = answered(server, path, request, status=400)
            assert expected in found["error"]["message"]
    assert server.metrics()[name] - before == 5 * len(bad)
    others = [line for line in response if line.startswith(b"data: {")]
    connection.close()
    assert len(others) > 100
    assert not any(b'"error"' in line for line in others)


def test_streaming(server, pages):
    connection, response = server.request(
        "POST", "/v1/chat/completions", body(pages[1], stream=True)
    )
    assert response.status == 200
    parts = []
    for line in response:
        if line.startswith(b"data: {"):
            parts.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    connection.close()
    assert "".join(parts) == pages[1].answer
    assert len([part for part in parts if part]) > 1


def test_two_choices(server, pages):
    answer = server.chat(pages[2], n=2, temperature=1, top_k=1)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [pages[2].answer] * 2


def test_repeated_page_hits_the_prefix_cache(server, pages):
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    assert server.chat(pages[0])["choices"][0]["message"]["content"] == pages[0].answer
    assert server.metrics()["vllm:prefix_cache_hits_total"] > before


def test_abort_by_disconnect(server, pages):
    """The client goes away during a long answer: the request ends, the next one is fine."""
    tokens = "vllm:generation_tokens_total"
    before = server.metrics()[tokens]
    connection, response = server.request(
        "POST",
        "/v1/chat/completions",
        body(pages[3], stream=True, max_tokens=600, ignore_eos=True),
    )
    assert b"data: " in response.readline()
    response.close()
    connection.close()
    assert server.chat(pages[3])["choices"][0]["message"]["content"] == pages[3].answer
    deadline = time.monotonic() + DEADLINE_S
    while (now := server.metrics())["vllm:num_requests_running"] > 0:
        assert time.monotonic() < deadline, "the abandoned request is still running"
    assert 0 < now[tokens] - before < 600
    assert now["vllm:kv_cache_usage_perc"] == 0


def test_log(server, pages):
    """The banner at start, and a line of totals per interval as long as there is news."""
    banner = server.wait_for("KV compression is on")
    for part in (
        "scorer bacon", "allocator uniform", f"budget {BUDGET} tokens per KV head", "window 32",
        f"block size {BLOCK_SIZE}", "CPU",
    ):  # fmt: skip
        assert part in banner
    deadline = time.monotonic() + DEADLINE_S
    found = None
    while found is None:  # workers count a little later what was kept
        assert time.monotonic() < deadline
        server.chat(pages[0])
        found = re.search(
            r"(\d+) requests compressed, (\d+) kept whole; ([1-9]\d*) of (\d+) prompt tokens kept "
            r"\((\d+) dropped\); (\d+) blocks returned",
            server.log,
        )
    compressed, _, kept, seen, dropped, blocks = map(int, found.groups())
    assert compressed > 0
    assert kept + dropped == seen
    assert 0 < kept < seen / 2
    assert blocks > 0
    # API servers log what they answer with 400 on some endpoints
    assert not re.search(r"EngineCore.*Traceback", server.log)


def test_the_log_tells_the_last_state(server, pages):
    """Nothing comes after the last request, and yet the line with it does."""
    server.chat(pages[1])
    totals = server.metrics()
    compressed = sum(
        count
        for name, count in totals.items()
        if "requests_total{" in name and "compressed" in name
    )
    kept = totals["vllm:kv_compression_kept_tokens_total"]
    line = server.wait_for(f"KV compression so far: {compressed:.0f} requests compressed")
    assert f"; {kept:.0f} of " in line


def test_dashboard_and_alerts_name_what_a_scrape_has(server):
    """Series that nobody exports draw empty panels, and alerts that never fire."""
    folder = Path(__file__).parents[2] / "deploy"
    dashboard = json.loads((folder / "grafana" / "kv-compression.json").read_text())
    alerts = yaml.safe_load((folder / "prometheus" / "alerts.yml").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    (group,) = alerts["groups"]
    expressions += [rule["expr"] for rule in group["rules"]]
    named = set(re.findall(r"vllm:\w+", " ".join(expressions)))
    assert len([name for name in named if name.startswith("vllm:kv_compression_")]) >= 8
    exported = {name.partition("{")[0] for name in server.metrics()}
    assert named <= exported, sorted(named - exported)
    labels = set(re.findall(r'(\w+)="', " ".join(server.metrics_text().splitlines())))
    used = set(re.findall(r'(\w+)=~?"', " ".join(expressions))) - {"instance"}  # Prometheus adds it
    assert used <= labels, used - labels


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--pipeline-parallel-size", "2"), "set --pipeline-parallel-size 1."),
        (("--max-model-len", "3585"), "--max-model-len 3584 or less"),
    ],
    ids=["by its configuration", "by a worker"],
)
def test_a_refusal_is_the_last_line(checkpoint, flags, reason):
    """Whoever looks at the end of the log sees why: vLLM itself says only that a process failed."""
    output = ends_with_error(checkpoint("llama", layers=2), "--kv-compression", "shiftkv", *flags)
    # Python's resource tracker, a process of its own, may warn at any time
    lines = [line for line in output.strip().splitlines() if "resource_tracker" not in line]
    lines = [line for line in lines if not line.lstrip().startswith("warnings.warn")]
    assert reason in lines[-1], output[-3000:]


def test_bad_method_does_not_start(docvqa):
    output = ends_with_error(docvqa, "--kv-compression", "bacno", "--kv-budget", "many")
    assert "unknown scorer 'bacno'. Did you mean 'bacon'? Valid: " in output
    assert "--kv-budget: a budget is a positive number of tokens or a ratio" in output


def test_bad_json_does_not_start(docvqa):
    output = ends_with_error(docvqa, "--kv-compression", "bacon", "--kv-compression-config", "{x")
    assert "--kv-compression-config is not valid JSON" in output


def test_budget_without_method_does_not_start(docvqa):
    output = ends_with_error(docvqa, "--kv-budget", "64")
    assert "set --kv-compression METHOD" in output


def test_missing_plugin_does_not_start(docvqa):
    """Without us the flags do not exist, so vLLM cannot start uncompressed."""
    output = ends_with_error(
        docvqa,
        "--kv-compression", "bacon",
        PYTHONPATH=str(HERE / "broken_plugin"),
        BROKEN_MODULE="vllm_kvcompress",
    )  # fmt: skip
    assert "--kv-compression" in output
    assert "unrecognized arguments" in output


def test_flags_survive_the_rust_front_end(docvqa, tmp_path):
    """That front end gets vLLM's arguments as JSON and would stumble over flags it does not know.

    Its binary is not in every build of vLLM, so a stand-in records what it is given and ends.
    """
    stand_in, record = tmp_path / "vllm-rs", tmp_path / "arguments"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {record}\n')
    stand_in.chmod(0o755)
    ends_with_error(
        docvqa,
        "--kv-compression", "bacon", "--kv-budget", "10%",
        VLLM_USE_RUST_FRONTEND="1",
        VLLM_RUST_FRONTEND_PATH=str(stand_in),
    )  # fmt: skip
    passed = json.loads(record.read_text().strip().splitlines()[-1])
    assert passed["additional_config"]["kv_compression"]["method"] == "bacon"
    assert not any(key.startswith("kv_compression") or key == "kv_budget" for key in passed)
