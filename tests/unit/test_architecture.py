# SPDX-License-Identifier: Apache-2.0
"""Rules that keep the code base small and its parts apart, checked on the sources."""

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.scoring import SCORERS

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "vllm_kvcompress"
KERNELS = REPOSITORY / "triton_kernels"
MAX_LINES = 400

FOUNDATIONS = {"budget", "options", "policy", "presets", "prompt", "request_slots", "workspace"}
"""Modules that know none of the others."""

MAY_IMPORT = {
    "": {"adapter"},  # register() alone
    "adapter": FOUNDATIONS
    | {"adapter", "allocation", "batch", "choices", "config", "kernels", "merging", "metrics"}
    | {
        "capacity",
        "orders",
        "page_state",
        "pipeline",
        "pipeline_inputs",
        "plan",
        "prefill_stats",
        "recording",
        "registry",
        "scoring",
    },
    "tools": {
        "adapter",
        "allocation",
        "budget",
        "capacity",
        "config",
        "merging",
        "plan",
        "presets",
        "prompt",
        "registry",
        "scoring",
        "tools",
    },
    "testing": {"kernels", "scoring", "testing"},
    "metrics": {"policy"},
    "pipeline": {"allocation", "kernels", "merging", "page_state", "pipeline_inputs", "scoring"}
    | {"workspace"},
    "recording": {"kernels", "pipeline", "pipeline_inputs", "scoring"},
    "pipeline_inputs": {"scoring"},
    "prefill_stats": {"kernels", "scoring"},
    "orders": {"plan"},
    "capacity": {"plan", "prompt"},
    "plan": {"allocation", "budget", "config", "prompt", "scoring"},
    "config": {
        "allocation",
        "budget",
        "merging",
        "policy",
        "presets",
        "prompt",
        "registry",
        "scoring",
    },
    "registry": {"allocation", "merging", "presets", "scoring"},
    "scoring": {"kernels", "options", "scoring", "workspace"},
    "allocation": {"allocation", "kernels", "options", "scoring", "workspace"},
    "merging": {"kernels", "merging", "options", "workspace"},
    "batch": {"plan", "scoring"},
    "choices": {"budget", "config", "policy", "presets", "registry", "scoring"},
    "page_state": {"kernels"},
    "kernels": {"kernels"},
    **{part: set() for part in FOUNDATIONS},
}
"""Which part of the package may import which others; adapter on top, never back."""

HOST_SYNCS = {"item", "tolist", "cpu"}
DEVICE_PARTS = (
    "pipeline",
    "page_state",
    "prefill_stats",
    "scoring",
    "allocation",
    "merging",
    "recording",
    "kernels",
)


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to; "" for the package's own __init__."""
    if path.is_relative_to(KERNELS):
        return "kernels"
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def product_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def written_files() -> list[Path]:
    """Every Python file of the repository that is ours."""
    folders = ("vllm_kvcompress", "triton_kernels", "tests", "benchmarks", "examples")
    return sorted(
        path
        for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / f for f in folders)]
        for path in ([path] if path.is_file() else path.rglob("*.py"))
    )


PRODUCT = product_files()


def label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("vllm_kvcompress.")}
    return found


def attributes(path: Path) -> set[str]:
    """Dotted attribute expressions of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


class TestImports:
    def test_every_part_has_a_place(self):
        assert {part_of(path) for path in PRODUCT} == MAY_IMPORT.keys()

    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_direction(self, path):
        wrong = imported_parts(path) - MAY_IMPORT[part_of(path)]
        assert not wrong, f"{part_of(path)} must not import {sorted(wrong)}"

    def test_directions_have_no_cycle(self):
        order = []
        left = {part: needs - {part} for part, needs in MAY_IMPORT.items()}
        while left:
            free = [part for part, needs in left.items() if needs <= set(order)]
            assert free, f"a cycle among {sorted(left)}"
            order += free
            left = {part: needs for part, needs in left.items() if part not in free}

    def test_the_entry_point_imports_nothing(self):
        """vLLM logs and skips a plugin whose import fails; only register() may fail loudly."""
        tree = ast.parse((PACKAGE / "__init__.py").read_text())
        assert not [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]


class TestSources:
    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_length(self, path):
        lines = len(path.read_text().splitlines())
        assert lines < MAX_LINES, f"{lines} lines: split it"

    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_no_catch_all(self, path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, "a bare except"
                caught = {ast.unparse(part) for part in ast.walk(node.type)}
                assert not caught & {"Exception", "BaseException"}

    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_settings_come_from_the_configuration(self, path):
        if path.name != "config.py" and part_of(path) != "tools":
            assert not attributes(path) & {"os.environ", "os.getenv", "os.putenv"}

    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_the_installed_version_is_not_asked(self, path):
        assert "vllm.__version__" not in attributes(path)

    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_no_attributes_are_probed(self, path):
        """getattr with a default hides that an attribute is gone."""
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                assert len(node.args) == 2

    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_the_device_is_never_waited_for(self, path):
        if part_of(path) in DEVICE_PARTS:
            calls = {
                node.func.attr
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            }
            assert not calls & HOST_SYNCS

    @pytest.mark.parametrize("path", written_files(), ids=label)
    def test_licence_comes_first(self, path):
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")

    @pytest.mark.parametrize("path", written_files(), ids=label)
    def test_no_open_ends_in_comments(self, path):
        """Unfinished work belongs into an issue, with its number."""
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        open_end = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")
        assert not [comment for comment in comments if open_end.search(comment)]

    @pytest.mark.parametrize("path", PRODUCT, ids=label)
    def test_modules_and_public_classes_say_what_they_are(self, path):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                inherited = any("Backend" in ast.unparse(base) for base in node.bases)
                assert ast.get_docstring(node) or inherited, node.name


class TestMethods:
    METHODS = (*SCORERS.values(), *ALLOCATORS.values(), *MERGES.values())
    ADAPTED = tuple(method for method in METHODS if method.name != "uniform")

    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_source(self, method):
        """A method names its paper, in the text and for the command line."""
        assert re.search(r"arXiv \d{4}\.\d{5}|CVPR \d{4}", method.source)
        text = " ".join(inspect.getdoc(method).split())
        assert f"Source: {method.source}" in text

    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_cost(self, method):
        """Of its own: what a method inherits is not what it costs."""
        assert vars(method)["cost"]

    @pytest.mark.parametrize("method", ADAPTED, ids=lambda m: m.name)
    def test_deviations_are_told(self, method):
        assert "Adaptation notes:" in inspect.getdoc(method)

    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_one_file_per_method(self, method):
        lines = inspect.getsource(inspect.getmodule(method)).splitlines()
        assert len(lines) < 150
