# SPDX-License-Identifier: Apache-2.0
"""Looks things up in the sources of a vLLM version, without importing it."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path


def bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that statements bind, branches included, with the statement that does."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield part.id, node
        elif isinstance(node, ast.If | ast.Try):
            yield from bindings(node.body + node.orelse)
            for handler in getattr(node, "handlers", []):
                yield from bindings(handler.body)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of all parameters, without ``*args`` and ``**kwargs``."""
    args = function.args
    return [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def required(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names of the parameters without a default."""
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    needed = positional[: len(positional) - len(args.defaults)]
    needed += [
        arg for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value is None
    ]
    return {arg.arg for arg in needed}


class Sources:
    """The tree of one vLLM version.

    Args:
        root: folder that contains ``vllm/``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019 - lives as long as the test session
    def module(self, name: str) -> ast.Module | None:
        path = self.root.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """The definition of a qualified name, through imports and base classes, and its module."""
        head, _, rest = name.partition(".")
        tree = self.module(module)
        if tree is None:
            return None
        found = [node for bound, node in bindings(tree.body) if bound == head]
        # a definition says more than an import of the same name, for type checkers say
        found.sort(key=lambda node: isinstance(node, ast.Import | ast.ImportFrom))
        for node in found:
            if isinstance(node, ast.ImportFrom):
                source = self.absolute(module, node)
                original = next(a.name for a in node.names if (a.asname or a.name) == head)
                result = self.find(source, original)
            elif isinstance(node, ast.Import):
                result = None
            else:
                result = module, node
            if result is not None:
                return self.member(*result, rest) if rest else result
        return None

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import statement names."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = self.root.joinpath(*parts).is_dir()
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *filter(None, [node.module])])

    def member(self, module: str, cls: ast.stmt, name: str) -> tuple[str, ast.stmt] | None:
        """A member of a class or of its bases."""
        for owner_module, owner in self.family(module, cls):
            for bound, node in bindings(owner.body):
                if bound == name:
                    return owner_module, node
        return None

    def family(self, module: str, cls: ast.stmt) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its bases, as far as vLLM defines them."""
        if not isinstance(cls, ast.ClassDef):
            return
        yield module, cls
        for base in cls.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name | ast.Attribute):
                found = self.find(module, ast.unparse(plain))
                if found is not None:
                    yield from self.family(*found)

    def attributes(self, module: str, cls: ast.stmt) -> set[str]:
        """Everything that instances of a class have: members, fields, what methods set on self."""
        names: set[str] = set()
        for _, owner in self.family(module, cls):
            names.update(bound for bound, _ in bindings(owner.body))
            for node in ast.walk(owner):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                ):
                    names.add(node.attr)
        return names

    def calls(self, function: ast.stmt, callee: str) -> list[ast.Call]:
        """Calls of ``callee``, or of a method of that name, inside a function."""
        return [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Call)
            and callee in (getattr(node.func, "id", None), getattr(node.func, "attr", None))
        ]
