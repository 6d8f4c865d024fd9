"""What the source of a class's forward says of the products that it makes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache

from torch import nn
from torch.nn import functional as F

from altgrad.nn.layer.raw import PRODUCTS

PRODUCT_CALLS = frozenset(
    [
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "linear",
        "bilinear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "einsum",
        "tensordot",
        "inner",
        "outer",
        "chain_matmul",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "mv",
        "dot",
        "kron",
        "grouped_mm",
        "_grouped_mm",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "lstm_cell",
        "gru_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
    ]
)

QUANTIZABLE = frozenset(call.__name__ for call in PRODUCTS if call is not F.scaled_dot_product_attention)
"""Names of the calls that `altgrad.nn.layer.raw` runs on quantized weights (attention multiplies activations)."""


@dataclass(frozen=True)
class Source:
    """What a forward's source shows.

    Args:
        calls: names of its product calls. multiplied: paths of the module's own attributes (`weight`, `out_proj.weight`) that
            stand in one, also by a local name, a subscript, a view or a cast. readable: whether there was a source.
    """

    calls: frozenset[str] = frozenset()
    multiplied: frozenset[str] = frozenset()
    readable: bool = True

    def __or__(self, other: Source) -> Source:
        return Source(self.calls | other.calls, self.multiplied | other.multiplied, self.readable and other.readable)

    def multiplies(self, parameter: str) -> bool:
        """Whether a parameter of that name stands in a product."""
        return any(parameter == path or parameter.startswith(f"{path}.") for path in self.multiplied)


@cache
def source_of(cls: type[nn.Module], method: str = "forward") -> Source:
    """The products in the forward of a class, in the methods of its own that it calls, and in `super().forward`.

    Calls made further down, in functions and modules that it calls, are not found.
    """
    owner = next((base for base in cls.__mro__ if method in vars(base)), None)
    if owner is None or owner is nn.Module:
        return Source()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(vars(owner)[method])))
    except (OSError, TypeError, SyntaxError):
        return Source(frozenset(["forward whose source cannot be read"]), readable=False)
    reader = _Reader(_own_name(tree))
    reader.visit(tree)
    found = Source(frozenset(reader.calls), frozenset(reader.multiplied))
    for name in sorted(reader.methods - {method}):
        if callable(getattr(cls, name, None)) and not hasattr(nn.Module, name):
            found |= source_of(cls, name)
    if reader.calls_super:
        after = cls.__mro__[cls.__mro__.index(owner) + 1 :]
        parent = next((base for base in after if method in vars(base)), None)
        found |= Source() if parent is None else source_of(parent, method)
    return found


class _Reader(ast.NodeVisitor):
    """Collects the product calls of a function, the attributes of `self` in them, and the methods that it calls."""

    def __init__(self, own: str) -> None:
        self.own = own  # what the method calls its module: "self", as a rule
        self.calls: set[str] = set()
        self.multiplied: set[str] = set()
        self.methods: set[str] = set()
        self.calls_super = False
        self._local: dict[str, set[str]] = {}  # local name -> attributes that it stands for

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self._local[name.id] = self._attributes(node.value)

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        for name in ast.walk(node.target):
            if isinstance(name, ast.Name):
                self._local[name.id] = self._attributes(node.iter)
        self.generic_visit(node)

    visit_comprehension = visit_For

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        for generator in node.generators:  # they say what the names in the element are
            self.visit(generator)
        self.visit(node.elt)

    visit_SetComp = visit_GeneratorExp = visit_ListComp

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        on = node.func.value if isinstance(node.func, ast.Attribute) else None
        if called in PRODUCT_CALLS:
            self._product(called, [*node.args, *(k.value for k in node.keywords), *([on] if on is not None else [])])
        elif "attention_interface" in called:
            self.calls.add("attention function")
        elif isinstance(on, ast.Name) and on.id == self.own:
            self.methods.add(called)
        elif called == "forward" and isinstance(on, ast.Call) and getattr(on.func, "id", "") == "super":
            self.calls_super = True

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            self._product("matmul", [node.left, node.right])

    def _product(self, called: str, operands: list[ast.expr]) -> None:
        self.calls.add(called)
        for operand in operands if called in QUANTIZABLE else ():
            self.multiplied |= self._attributes(operand)

    def _attributes(self, node: ast.AST) -> set[str]:
        """The attributes of self that an expression stands for: what calls make of their arguments is something else,
        unless the attribute is what the method is of."""
        if isinstance(node, ast.Attribute):
            path = self._path(node)
            return {path} if path else self._attributes(node.value)
        if isinstance(node, ast.Name):
            return self._local.get(node.id, set())
        if isinstance(node, ast.Call):
            on = node.func.value if isinstance(node.func, ast.Attribute) else None
            found = self._attributes(on) if on is not None else set()
            return found or set().union(*map(self._attributes, node.args))
        if isinstance(node, ast.Subscript | ast.Starred):
            return self._attributes(node.value)
        return set().union(*map(self._attributes, ast.iter_child_nodes(node)))

    def _path(self, node: ast.Attribute) -> str:
        """`weight` of self.weight, `out_proj.weight` of self.out_proj.weight, without the properties of tensors; else ""."""
        parts: list[str] = []
        here: ast.expr = node
        while isinstance(here, ast.Attribute):
            parts.append(here.attr)
            here = here.value
        if not (isinstance(here, ast.Name) and here.id == self.own):
            return ""
        return ".".join(part for part in reversed(parts) if part not in ("T", "mT", "H", "mH", "data"))


def _own_name(tree: ast.Module) -> str:
    method = next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)
    first = [] if method is None else [*method.args.posonlyargs, *method.args.args][:1]
    return first[0].arg if first else "self"
