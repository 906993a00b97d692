# SPDX-License-Identifier: Apache-2.0
"""``/metrics`` of servers whose series come from several processes."""

import json

import pytest
from engine import random_prompt
from prometheus_client.parser import text_string_to_metric_families
from servers import Server

LENGTH, OUTPUT_TOKENS = 300, 4
PREFIX = "vllm:kv_compression_"


def samples(server: Server, name: str) -> dict[tuple[str, str], float]:
    """Of one series, by engine and model name; other labels are part of the name."""
    found = {}
    for family in text_string_to_metric_families(server.metrics_text()):
        for sample in family.samples:
            labels = dict(sample.labels)
            place = labels.pop("engine", ""), labels.pop("model_name", "")
            if name == sample.name + "".join(f" {k}={v}" for k, v in labels.items()):
                assert place not in found, "a series is there once"
                found[place] = sample.value
    return found


def complete(server: Server, seed: int, engine: int) -> None:
    body = {
        "prompt": random_prompt(LENGTH, seed),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    headers = {"X-data-parallel-rank": str(engine)}
    connection, response = server.request("POST", "/v1/completions", body, **headers)
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer


@pytest.mark.parametrize(
    ("flags", "num_engines"),
    [
        (("--api-server-count", "2"), 1),
        (("--data-parallel-size", "2"), 2),
        ((), 1),
    ],
    ids=["api_servers", "engines", "folder"],
)
def test_every_scrape_has_all_engines(checkpoint, tmp_path, flags, num_engines):
    """Whichever API server answers, the numbers are those of all engines, labelled as vLLM's."""
    environment = {} if flags else {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    server = Server(
        checkpoint("llama", layers=2),
        "--kv-compression", "bacon", "--kv-budget", "96", "--served-model-name", "tiny",
        *flags,
        **environment,
    )  # fmt: skip
    engines = [(str(index), "tiny") for index in range(num_engines)]
    try:
        server.wait_until_ready()
        assert samples(server, PREFIX + "prompt_tokens_total") == dict.fromkeys(engines, 0)
        for seed in range(4):
            complete(server, seed, engine=seed % num_engines)
        each = 4 // num_engines
        for _ in range(4):  # connections are spread over the API servers
            for name, expected in (
                ("requests_total method=bacon+uniform outcome=compressed", each),
                ("prompt_tokens_total", each * LENGTH),
                ("seconds_count", each),
                ("seconds_bucket le=+Inf", each),
            ):
                assert samples(server, PREFIX + name) == dict.fromkeys(engines, expected)
            kept = samples(server, PREFIX + "kept_tokens_total")
            assert all(each * 96 <= value < each * 128 for value in kept.values())
            # one label set with vLLM's own
            assert samples(server, "vllm:generation_tokens_total").keys() == kept.keys()
    finally:
        server.stop()
