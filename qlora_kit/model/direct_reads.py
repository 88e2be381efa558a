"""Linear modules whose weight the module around them reads itself, as fused kernels of state-space layers do.

What such code computes passes the linear module by, and with it LoRA and 4-bit storage. It is seen in its source:
`self.out_proj.weight`, handed on as a tensor.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

_ABOUT = ("dtype", "device", "shape", "ndim", "is_cuda", "numel", "size", "requires_grad")  # and not the values
_NOT_COMPUTING = ("__init__", "_init_weights", "reset_parameters")
_OF_SETTINGS = (ast.Compare, ast.cmpop, ast.Attribute, ast.Name, ast.Constant, ast.Load)


def read_directly(model: nn.Module) -> dict[str, str]:
    """Full names of such linear modules, with the class of the module that reads them."""
    found: dict[str, str] = {}
    read: dict[type[nn.Module], list[_Read]] = {}
    for name, module in model.named_modules():
        linears = [child for child, inner in module.named_children() if isinstance(inner, nn.Linear)]
        kind = type(module)
        if linears and kind not in read:
            read[kind] = _reads(kind)
        are_read = {one.child for one in read.get(kind, ()) if one.may_happen(module)}
        found |= {f"{name}.{child}".lstrip("."): kind.__name__ for child in linears if child in are_read}
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


@dataclass(frozen=True)
class _Read:
    """Where a class reads the `weight` of a child.

    Attributes:
        conditions: around the place, each with what it has to come to.
    """

    child: str
    conditions: tuple[tuple[ast.expr, bool], ...]

    def may_happen(self, module: nn.Module) -> bool:
        """False where a setting of the module speaks against it for good, as BLOOM's `pretraining_tp` does."""
        return all(_known(test, module) in (wanted, None) for test, wanted in self.conditions)


def _known(test: ast.expr, module: nn.Module) -> bool | None:
    """What a condition on a module's own settings comes to; None where it hangs on anything else."""
    if isinstance(test, ast.BoolOp):
        parts = [_known(part, module) for part in test.values]
        ends = isinstance(test.op, ast.Or)  # what one part decides
        return ends if ends in parts else None if None in parts else not ends
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _known(test.operand, module)
        return None if inner is None else not inner
    names = [node for node in ast.walk(test) if isinstance(node, ast.Attribute)]
    if not names or any(not isinstance(node, _OF_SETTINGS) for node in ast.walk(test)):
        return None
    if any(not _is_setting(node, module) for node in names):
        return None
    return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}}, {"self": module}))  # noqa: S307  # names, numbers and comparisons alone, see above


def _is_setting(node: ast.Attribute, module: nn.Module) -> bool:
    is_own = isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr != "training"
    return is_own and isinstance(vars(module).get(node.attr), bool | int | float | str)


def _reads(kind: type[nn.Module]) -> list[_Read]:
    """Where the code of a class reads a child's `weight`; none where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return []
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [read for one in methods if one.name not in _NOT_COMPUTING for read in _read_in(one, _asked(one), ())]


def _asked(method: ast.FunctionDef) -> set[ast.expr]:
    """Weights that a method asks for something beside their values."""
    return {node.value for node in ast.walk(method) if isinstance(node, ast.Attribute) and node.attr in _ABOUT}


def _read_in(node: ast.AST, asked: set[ast.expr], conditions: tuple[tuple[ast.expr, bool], ...]) -> Iterator[_Read]:
    if isinstance(node, ast.If | ast.IfExp):
        yield from _read_in(node.test, asked, conditions)
        for part, wanted in ((node.body, True), (node.orelse, False)):
            for one in part if isinstance(part, list) else [part]:
                yield from _read_in(one, asked, (*conditions, (node.test, wanted)))
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in asked:
        owner = node.value
        if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self":
            yield _Read(owner.attr, conditions)
    for inner in ast.iter_child_nodes(node):
        yield from _read_in(inner, asked, conditions)
