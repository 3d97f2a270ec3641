"""Whether a place that reads a weight computes with it, or only asks what it is, initialises it or ties it."""

import ast

# Attributes and methods that say what a tensor is, without its values.
_FACTS = frozenset({
    "dtype", "device", "shape", "size", "dim", "ndim", "numel", "nelement", "stride", "is_cuda", "is_meta", "is_cpu",
    "requires_grad", "requires_grad_", "element_size", "itemsize", "nbytes", "layout", "data_ptr", "grad", "is_leaf",
    "is_floating_point", "is_contiguous", "register_hook", "__class__",
})  # fmt: skip
ASKING = frozenset({"isinstance", "hasattr", "getattr", "id", "type", "len"})
"""Functions that ask about an object and do nothing with it."""
# Functions that take only dtype, device or shape of an argument.
_LIKE = frozenset({
    "type_as", "to", "view_as", "expand_as", "reshape_as", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like",
})  # fmt: skip


def is_harmless(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a read of a weight only asks what it is (dtype, device, shape, identity), initialises it or ties it.

    Args:
        node: The expression that reads the weight.
        parents: Parent of each node of the method's syntax tree.
    """
    parent = parents.get(node)
    while isinstance(parent, ast.Attribute) and parent.attr in ("data", "T", "mT"):
        node, parent = parent, parents.get(parent)
    if isinstance(parent, ast.Attribute):
        return parent.attr in _FACTS or parent.attr.endswith("_")  # in-place methods write, they do not compute
    if isinstance(parent, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
    if isinstance(parent, ast.Call):
        called = parent.func
        if isinstance(called, ast.Name):
            return called.id in ASKING
        is_init = isinstance(called, ast.Attribute) and "init" in ast.unparse(called.value).split(".")
        return is_init or (isinstance(called, ast.Attribute) and called.attr in _LIKE and node in parent.args)
    if isinstance(parent, ast.Assign):
        if len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            return _name_is_harmless(parent, parent.targets[0].id, parents)
        return all(isinstance(target, ast.Attribute) and target.attr == "weight" for target in parent.targets)
    return False


def _name_is_harmless(assigned: ast.Assign, name: str, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether every use of a name that stands for a weight is harmless."""
    uses = [
        node for node in parents if isinstance(node, ast.Name) and node.id == name and node is not assigned.targets[0]
    ]
    return all(isinstance(node.ctx, ast.Load) and is_harmless(node, parents) for node in uses)
