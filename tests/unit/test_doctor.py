# SPDX-License-Identifier: Apache-2.0
"""``vllm-kvcompress doctor`` and ``--version``."""

import importlib.metadata
import re

import pytest

from vllm_kvcompress import __version__, registry
from vllm_kvcompress.tools import doctor
from vllm_kvcompress.tools import main as command


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"vllm-kvcompress {__version__} (Python 3.")
    assert f"torch {importlib.metadata.version('torch')}" in text


def test_flags_need_a_model(capsys):
    with pytest.raises(SystemExit):
        command.main(["doctor", "--kv-budget", "64"])
    assert "come after a model: --kv-budget 64" in capsys.readouterr().err


class TestPlugin:
    def test_is_loaded(self, monkeypatch):
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        assert doctor.plugin_faults() == []
        monkeypatch.setenv("VLLM_PLUGINS", "other,kvcompress")
        assert doctor.plugin_faults() == []

    def test_is_excluded(self, monkeypatch):
        monkeypatch.setenv("VLLM_PLUGINS", "other")
        (fault,) = doctor.plugin_faults()
        assert "VLLM_PLUGINS=other excludes the plugin" in fault

    def test_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
        (fault,) = doctor.plugin_faults()
        assert "not installed in this environment" in fault


class TestModel:
    @pytest.fixture(autouse=True)
    def vllm(self, monkeypatch):
        pytest.importorskip("vllm")
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    @pytest.fixture
    def said(self, capsys):
        def said(status: int, *arguments: str) -> str:
            assert command.main(["doctor", *arguments]) == status
            return capsys.readouterr().out

        return said

    def test_a_machine(self, said):
        text = said(0)
        assert re.search(r"^attention backend: +CPU_ATTN,", text, re.MULTILINE)
        assert re.search(r"^plugin: +vLLM loads it$", text, re.MULTILINE)
        assert re.search(r"^vllm-kvcompress: +\d", text, re.MULTILINE)

    def test_a_model_that_is_served(self, said, docvqa):
        text = said(0, docvqa, "--kv-budget", "64")
        assert f"$ vllm serve {docvqa} --kv-compression bacon --kv-budget 64\n" in text
        assert "Nothing in the configuration is refused." in text

    def test_all_reasons_at_once(self, said, docvqa):
        text = said(1, docvqa, "--kv-budget", "16", "--kv-window", "8",
                    "--pipeline-parallel-size", "2")  # fmt: skip
        assert "  - pipeline parallelism: set --pipeline-parallel-size 1." in text
        assert "  - --kv-budget 16 is smaller than one block: " in text

    def test_a_bad_config(self, said, docvqa):
        text = said(1, docvqa, "--kv-compression=bacno")
        assert "unknown scorer 'bacno'. Did you mean 'bacon'?" in text
        assert "--kv-compression bacon" not in text

    def test_no_model(self, said, tmp_path):
        assert "vLLM itself refuses:" in said(1, str(tmp_path))

    def test_packages_with_faults(self, said, monkeypatch):
        monkeypatch.setattr(registry, "load", lambda: ("other offers nonsense.",))
        assert "other offers nonsense." in said(1)
