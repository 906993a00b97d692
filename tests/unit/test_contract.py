# SPDX-License-Identifier: Apache-2.0
"""The package fits vLLM: what ``adapter/symbols.py`` lists is all it uses, and all of it exists.

The sources are read, not imported, so that a version which is not installed can be checked too: set
VLLM_KVCOMPRESS_EXTRA_VLLM_SOURCE to a folder that contains its ``vllm/``.
"""

import ast
import importlib.util
import os
from pathlib import Path

import pytest
from vllm_sources import Sources, bindings, parameters, required

from vllm_kvcompress.adapter.symbols import CALLS, SYMBOLS, Use

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "vllm_kvcompress"
KERNELS = REPOSITORY / "triton_kernels"
ADAPTER = PACKAGE / "adapter"
EXTRA_VARIABLE = "VLLM_KVCOMPRESS_EXTRA_VLLM_SOURCE"


def trees() -> dict[str, Sources]:
    """The vLLM versions to check, by name."""
    found = {}
    installed = importlib.util.find_spec("vllm")
    if installed is not None and installed.origin is not None:
        found["installed"] = Sources(Path(installed.origin).parent.parent)
    extra = os.environ.get(EXTRA_VARIABLE)
    if extra:
        found["extra"] = Sources(Path(extra))
    return found


TREES = trees()
on_every_tree = pytest.mark.parametrize("sources", TREES.values(), ids=TREES.keys())


def vllm_imports(path: Path) -> dict[str, tuple[str, str]]:
    """(module, name) of everything a file imports from vLLM, by its name in the file."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name] = (alias.name, "")
    return {name: pair for name, pair in found.items() if pair[0].split(".")[0] == "vllm"}


def wrapped_places(path: Path) -> list[tuple[str, str]]:
    """(owner as written, name) of every ``wrap`` in a file whose owner is imported from vLLM."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    return [
        (ast.unparse(call.args[0]), ast.literal_eval(call.args[1]))
        for call in calls
        if ast.unparse(call.func) == "wrap" and ast.unparse(call.args[0]) in vllm_imports(path)
    ]


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


class TestImports:
    @pytest.mark.parametrize("path", python_files(ADAPTER), ids=lambda path: path.name)
    def test_the_adapter_imports_listed_symbols_only(self, path):
        listed = {(symbol.module, symbol.name.split(".")[0]) for symbol in SYMBOLS}
        modules = {symbol.module for symbol in SYMBOLS}
        missing = [
            (module, name)
            for module, name in vllm_imports(path).values()
            if (module, name) not in listed and f"{module}.{name}" not in modules
        ]
        assert not missing, f"add to adapter/symbols.py: {missing}"

    @pytest.mark.parametrize("path", python_files(ADAPTER), ids=lambda path: path.name)
    def test_what_is_used_of_an_imported_module_is_listed(self, path):
        modules = {symbol.module for symbol in SYMBOLS}
        imported = {name: ".".join(pair) for name, pair in vllm_imports(path).items()}
        used = {
            (imported[node.value.id], node.attr)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and imported.get(node.value.id) in modules
        }
        assert used <= {(symbol.module, symbol.name) for symbol in SYMBOLS}

    @pytest.mark.parametrize("path", python_files(ADAPTER), ids=lambda path: path.name)
    def test_every_wrapped_function_is_listed(self, path):
        listed = {
            (symbol.module, symbol.name)
            for symbol in SYMBOLS
            if symbol.use in (Use.WRAPPED, Use.REPLACED)
        }
        for owner, name in wrapped_places(path):
            module, imported = vllm_imports(path)[owner]
            assert {(module, f"{imported}.{name}"), (f"{module}.{imported}", name)} & listed

    def test_nothing_else_imports_vllm(self):
        outside = [
            path
            for path in (*python_files(PACKAGE), *python_files(KERNELS))
            if ADAPTER not in path.parents and vllm_imports(path)
        ]
        assert not outside

    def test_the_adapter_imports_vllm_at_all(self):
        assert sum(len(vllm_imports(path)) for path in python_files(ADAPTER)) > 20
        assert sum(len(wrapped_places(path)) for path in python_files(ADAPTER)) > 4

    def test_every_listed_symbol_has_a_reason_and_stands_once(self):
        keys = [(symbol.module, symbol.name) for symbol in SYMBOLS]
        assert len(keys) == len(set(keys))
        assert all(entry.reason for entry in (*SYMBOLS, *CALLS))


def in_order(names: tuple[str, ...], among: list[str]) -> bool:
    rest = iter(among)
    return all(name in rest for name in names)


class TestSources:
    @on_every_tree
    def test_the_tree_is_a_vllm(self, sources):
        assert sources.module("vllm") is not None

    @on_every_tree
    @pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda s: f"{s.module}:{s.name}")
    def test_symbol(self, sources, symbol):
        found = sources.find(symbol.module, symbol.name)
        assert found is not None, f"{symbol.module}.{symbol.name} is gone; {symbol.reason}"
        module, node = found
        if symbol.use is Use.HELD:
            missing = set(symbol.relies_on) - sources.attributes(module, node)
            assert not missing, f"{symbol.name} has no {sorted(missing)}; {symbol.reason}"
            return
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), (
            f"{symbol.name} is no function; {symbol.reason}"
        )
        names = parameters(node)
        if symbol.use is Use.REPLACED:
            assert names == list(symbol.relies_on), symbol.reason
        else:
            assert in_order(symbol.relies_on, names), f"{names}; {symbol.reason}"
        if symbol.use is Use.CALLED:
            assert required(node) <= set(symbol.relies_on), symbol.reason
        if symbol.returns is not None:
            assert node.returns is not None
            assert ast.unparse(node.returns) == symbol.returns

    @on_every_tree
    @pytest.mark.parametrize("path", python_files(ADAPTER), ids=lambda path: path.name)
    def test_wrapped_functions_are_their_owners_own(self, sources, path):
        """An inherited function is not found, and wrapping it would change its base class."""
        for owner, name in wrapped_places(path):
            module, imported = vllm_imports(path)[owner]
            body = sources.module(f"{module}.{imported}") or sources.find(module, imported)[1]
            assert name in dict(bindings(body.body)), f"{owner}.{name}"

    @on_every_tree
    @pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c.caller}:{c.callee}")
    def test_call(self, sources, call):
        found = sources.find(call.module, call.caller)
        assert found is not None, f"{call.caller} is gone; {call.reason}"
        calls = sources.calls(found[1], call.callee)
        assert calls, f"{call.caller} does not call {call.callee}; {call.reason}"
        passed = [{keyword.arg for keyword in node.keywords} for node in calls]
        assert any(set(call.keywords) <= names for names in passed), call.reason


class TestReader:
    """The reader of sources itself must be able to say no."""

    @pytest.fixture
    def sources(self, tmp_path):
        files = {
            "vllm/__init__.py": "from .inner import Derived as Renamed\n",
            "vllm/inner/__init__.py": "from vllm.inner.base import Base\n"
            "class Derived(Base[int]):\n"
            "    field: int = 0\n"
            "    def method(self, a, *, b=1): self.late = a\n",
            "vllm/inner/base.py": "if 1:\n    class Base:\n        def old(self): ...\n",
        }
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Sources(tmp_path)

    def test_finds_through_imports_and_bases(self, sources):
        module, cls = sources.find("vllm", "Renamed")
        assert module == "vllm.inner"
        assert sources.attributes(module, cls) == {"field", "method", "late", "old"}
        assert sources.find("vllm", "Renamed.old")[0] == "vllm.inner.base"
        _, method = sources.find("vllm", "Renamed.method")
        assert parameters(method) == ["self", "a", "b"]
        assert required(method) == {"self", "a"}

    def test_says_no(self, sources):
        assert sources.find("vllm", "Derived") is None
        assert sources.find("vllm", "Renamed.new") is None
        assert sources.find("vllm.other", "Renamed") is None
        assert not in_order(("b", "a"), ["self", "a", "b"])
