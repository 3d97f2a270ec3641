"""One walk over the source of one method: which weights below self it reads, which modules it calls or hands on."""

import ast
from dataclasses import dataclass, field

from semisparse.surgery.source.harmless import ASKING, is_harmless

Path = tuple[str, ...]
"""Attribute names and constant indices that lead from self to a module."""

# Attributes and methods that give modules without naming them one by one.
_SEVERAL = frozenset({
    "children", "named_children", "modules", "named_modules", "values", "items", "_modules", "get_submodule",
})  # fmt: skip
ANY: Path = ("*",)
"""Entry among the calls of a class that may call any module below it."""


@dataclass(slots=True)
class Uses:
    """What one class does with the modules below it.

    Attributes:
        reads: Path of a module whose weight is read -> the place in the source.
        calls: Paths of modules that are called or handed on; ANY if any module may be.
    """

    reads: dict[Path, str] = field(default_factory=dict)
    calls: set[Path] = field(default_factory=set)


class Reader:
    """One walk over one method.

    Args:
        uses: What is found is added here.
        name: Of the method, for places.
        first_line: Of the method in its file.
        sets_up: Whether it only constructs, initialises, saves or shows the module; see class_uses.py.
        inner: Names of its closure, whose functions are read by themselves.
    """

    def __init__(self, uses: Uses, name: str, first_line: int, sets_up: bool, inner: frozenset[str]) -> None:
        self._uses, self._name, self._first_line, self._sets_up, self._inner = uses, name, first_line, sets_up, inner
        self._names: dict[str, set[Path]] = {}  # what a local name stands for; several after branches

    def read(self, tree: ast.Module) -> None:
        """Add what the function in tree reads and calls."""
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        first = next((node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda,
                                                                            ast.AsyncFunctionDef))), None)  # fmt: skip
        if first is None:
            return
        arguments = [*first.args.posonlyargs, *first.args.args]
        if arguments:
            self._names[arguments[0].arg] = {()}
        self._note_aliases(tree)
        for node in ast.walk(tree):
            self._note(node, parents)

    def _note_aliases(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or len(node.targets) != 1:
                continue
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
                pairs = list(zip(target.elts, value.elts, strict=True))
            else:
                pairs = [(target, value)]
            for one, other in pairs:
                if isinstance(one, ast.Name) and (path := self._path(other)) is not None:
                    self._names.setdefault(one.id, set()).add(path)

    def _note(self, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> None:
        weight_of = self._weight_of(node)
        if weight_of:
            if not is_harmless(node, parents):
                line = self._first_line + node.lineno - 1  # type: ignore[attr-defined]
                self._uses.reads.setdefault(weight_of, f"{self._name}, line {line}")
            return
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)) and not self._sets_up:
            self._note_several(node)
        if isinstance(node, ast.Name):
            self._note_name(node, parents)
        path = self._path(node) if isinstance(node, (ast.Attribute, ast.Subscript, ast.Name, ast.Call)) else None
        if not path:
            return
        if self._sets_up:
            if self._is_kept(node, parents):
                self._uses.calls.add(path)
            return
        parent = parents.get(node)
        called = isinstance(parent, ast.Call) and parent.func is node
        by_name = isinstance(parent, ast.Attribute) and parent.attr in ("forward", "__call__")
        if called or by_name or self._is_handed_on(node, parents):
            self._uses.calls.add(path)

    def _note_name(self, node: ast.Name, parents: dict[ast.AST, ast.AST]) -> None:
        """Note a call of a name that stands for one of several modules, or that self itself is handed on."""
        parent, meant = parents.get(node), self._names.get(node.id, set())
        if not isinstance(parent, ast.Call) or self._sets_up:
            return
        if len(meant) > 1:
            self._uses.calls |= meant
        elif meant == {()} and node in parent.args and not self._asks_or_delegates(parent.func):
            self._uses.calls.add(ANY)

    def _asks_or_delegates(self, function: ast.expr) -> bool:
        """Whether a call with self only asks about it, or runs a method whose source is read anyway."""
        if isinstance(function, ast.Name):
            return function.id in ASKING or function.id == "super" or function.id in self._inner
        return isinstance(function, ast.Attribute) and ast.unparse(function.value).rpartition(".")[2][:1].isupper()

    def _note_several(self, node: ast.Attribute | ast.Subscript | ast.Call) -> None:
        """Note modules that are taken without a name: a variable index, a slice, children(), getattr(self, name)."""
        varies = isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Constant)
        if varies or (isinstance(node, ast.Attribute) and node.attr in _SEVERAL):
            path = self._path(node.value)  # type: ignore[union-attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args:
            constant = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            path = None if constant else self._path(node.args[0])
        else:
            return
        if path is not None:
            self._uses.calls.add(path or ANY)

    def _is_kept(self, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
        """Whether a constructor keeps the module under a second name: in a list, a dict or another attribute."""
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return False
        parent = parents.get(node)
        return isinstance(parent, (ast.List, ast.Tuple, ast.Dict, ast.Set)) or (
            isinstance(parent, ast.Assign)
            and any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in parent.targets)
        )

    def _is_handed_on(self, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
        """Whether the module itself goes somewhere that may call it: an argument, a list, a loop."""
        parent = parents.get(node)
        if isinstance(parent, ast.Tuple) and isinstance(parents.get(parent), ast.Assign):
            return False  # names for it, which are followed
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load) or isinstance(node, ast.Name):
            return isinstance(node, ast.Name) and isinstance(parent, (ast.Call, ast.For, ast.List, ast.Tuple))
        if isinstance(parent, ast.Call):
            return not (isinstance(parent.func, ast.Name) and parent.func.id in ASKING)
        if isinstance(parent, ast.If):
            return parent.test is not node
        return not isinstance(parent, (ast.Attribute, ast.Subscript, ast.Compare, ast.Assign, ast.Expr, ast.UnaryOp))

    def _weight_of(self, node: ast.AST) -> Path | None:
        """The path whose weight this expression reads, or None."""
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            return self._path(node.value)
        if _is_getattr(node) and node.args[1].value == "weight":  # type: ignore[attr-defined]
            return self._path(node.args[0])  # type: ignore[attr-defined]
        return None

    def _path(self, node: ast.AST) -> Path | None:
        """Attribute names and constant indices from self to what node stands for; None for anything else."""
        if isinstance(node, ast.Name):
            meant = self._names.get(node.id, set())
            return next(iter(meant)) if len(meant) == 1 else None
        if isinstance(node, ast.Attribute):
            base, step = self._path(node.value), node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base, step = self._path(node.value), str(node.slice.value)
        elif _is_getattr(node):
            base, step = self._path(node.args[0]), str(node.args[1].value)  # type: ignore[attr-defined]
        else:
            return None
        return None if base is None else (*base, step)


def _is_getattr(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
    )
