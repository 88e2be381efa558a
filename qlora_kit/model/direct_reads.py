"""Linear modules whose weight the module around them reads itself, as fused kernels of state-space layers do.

What such code computes passes the linear module by, and with it LoRA and 4-bit storage. It is seen in its source:
`self.out_proj.weight`, handed on as a tensor.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator

from torch import nn

_ABOUT = ("dtype", "device", "shape", "ndim", "is_cuda", "numel", "size", "requires_grad")  # and not the values
_NOT_COMPUTING = ("__init__", "_init_weights", "reset_parameters")


def read_directly(model: nn.Module) -> dict[str, str]:
    """Full names of such linear modules, with the class of the module that reads them."""
    found: dict[str, str] = {}
    read: dict[type[nn.Module], frozenset[str]] = {}
    for name, module in model.named_modules():
        linears = [child for child, inner in module.named_children() if isinstance(inner, nn.Linear)]
        kind = type(module)
        if linears and kind not in read:
            read[kind] = _children_read(kind)
        found |= {f"{name}.{child}".lstrip("."): kind.__name__ for child in linears if child in read[kind]}
    return found


def initialized_directly(model: nn.Module) -> list[str]:
    """Full names of linear modules whose `weight` the model's code fills in before it is loaded, by that name.

    Where such a module holds its weight in another form, transformers cannot load the model.
    """
    kinds = [kind for kind in type(model).__mro__ if "_init_weights" in vars(kind)]
    filled = {pair for kind in kinds for pair in _filled_in(vars(kind)["_init_weights"])}
    return [
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules()
        for child, inner in module.named_children()
        if isinstance(inner, nn.Linear) and any((kind.__name__, child) in filled for kind in type(module).__mro__)
    ]


def _filled_in(method: Callable[..., object]) -> Iterator[tuple[str, str]]:
    """Names of a class of modules and of its child, of `if isinstance(module, Mixer): fill(module.out_proj.weight)`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return
    for branch in (node for node in ast.walk(tree) if isinstance(node, ast.If)):
        kinds = {node.id for node in ast.walk(branch.test) if isinstance(node, ast.Name)}
        for line in branch.body:
            for node in ast.walk(line):
                if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
                    child = node.value.attr
                    yield from ((kind, child) for kind in kinds)


def _children_read(kind: type[nn.Module]) -> frozenset[str]:
    """The children of a class whose `weight` its code reads; none where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return frozenset(child for one in methods if one.name not in _NOT_COMPUTING for child in _read_in(one))


def _read_in(method: ast.FunctionDef) -> Iterator[str]:
    asked = {node.value for node in ast.walk(method) if isinstance(node, ast.Attribute) and node.attr in _ABOUT}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in asked:
            owner = node.value
            if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self":
                yield owner.attr
