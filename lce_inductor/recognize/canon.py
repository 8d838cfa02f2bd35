"""One name per operation: functions, methods, in-place spellings, modules and aten overloads map to one Call."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node


class Attr(NamedTuple):
    """A parameter of a call_module node; becomes a get_attr node when the graph is rewritten."""

    path: str


class Call(NamedTuple):
    """A node under its canonical name, arguments bound to that operation's parameter names."""

    name: str
    node: Node
    args: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        return self.args.get(name, default)


# Canonical name -> parameters in order. "*x" collects the remaining positional arguments.
_PARAMS: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "addmm": ("bias", "input", "other"),
    "einsum": ("equation", "*operands"),
    "cast": ("input", "*to"),
    "same": ("input",),
    "detach": ("input",),
    "reshape": ("input", "*shape"),
    "flatten": ("input", "start_dim", "end_dim"),
    "unsqueeze": ("input", "dim"),
    "squeeze": ("input", "dim"),
    "permute": ("input", "*dims"),
    "transpose": ("input", "dim0", "dim1"),
    "t": ("input",),
    "mT": ("input",),
    "getitem": ("input", "key"),
    "slice": ("input", "dim", "start", "end", "step"),
    "select": ("input", "dim", "index"),
    "narrow": ("input", "dim", "start", "length"),
    "log_softmax": ("input", "dim", "dtype"),
    "softmax": ("input", "dim", "dtype"),
    "logsumexp": ("input", "dim", "keepdim"),
    "max": ("input", "dim", "keepdim"),
    "amax": ("input", "dim", "keepdim"),
    "argmax": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim", "dtype"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "gather": ("input", "dim", "index", "sparse_grad"),
    "take_along_dim": ("input", "index", "dim"),
    "index_select": ("input", "dim", "index"),
    "one_hot": ("input", "num_classes"),
    "masked_fill": ("input", "mask", "value"),
    "split": ("input", "split_size", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "unbind": ("input", "dim"),
    "unflatten": ("input", "dim", "*sizes"),
    "stack": ("tensors", "dim"),
    "broadcast_tensors": ("*tensors",),
    "clamp": ("input", "min", "max"),
    "movedim": ("input", "source", "destination"),
    "mul": ("input", "other"),
    "div": ("input", "other"),
    "add": ("input", "other"),
    "sub": ("input", "other"),
    "rsub": ("input", "other"),
    "pow": ("input", "exponent"),
    "scatter": ("input", "dim", "index", "src"),
    "nll_loss": ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "cross_entropy": (
        "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
    ),
}  # fmt: skip

# aten orders the parameters of some operations differently.
_ATEN_PARAMS: dict[str, tuple[str, ...]] = {
    "nll_loss": ("input", "target", "weight", "reduction", "ignore_index"),
    "cross_entropy": ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing"),
}

_ALIASES = {
    "mm": "matmul",
    "bmm": "matmul",
    "__matmul__": "matmul",
    "float": "cast",
    "half": "cast",
    "bfloat16": "cast",
    "double": "cast",
    "to": "cast",
    "type": "cast",
    "_to_copy": "cast",
    "convert_element_type": "cast",
    "contiguous": "same",
    "clone": "same",
    "alias": "same",
    "view": "reshape",
    "_unsafe_view": "reshape",
    "_log_softmax": "log_softmax",
    "logits_to_log_probs": "log_softmax",
    "nll_loss_forward": "nll_loss",
    "nll_loss2d": "nll_loss",
    "nll_loss2d_forward": "nll_loss",
    "nll_loss_nd": "nll_loss",
    "cross_entropy_loss": "cross_entropy",
    "__getitem__": "getitem",
    "_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "special_logsumexp": "logsumexp",
    "moveaxis": "movedim",
    "multiply": "mul",
    "__mul__": "mul",
    "__rmul__": "mul",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "__truediv__": "div",
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "sub",
    "__rsub__": "rsub",
    "subtract": "sub",
    "negative": "neg",
    "__neg__": "neg",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "adjoint": "mT",
    "mH": "mT",
    "_get_data_attr": "detach",
    "numpy_T": "t",
    "matrix_H": "t",
}

_FUNCTIONS: dict[Any, str] = {
    operator.matmul: "matmul",
    operator.getitem: "getitem",
    torch.functional.einsum: "einsum",
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll_loss",
    F.log_softmax: "log_softmax",
}

# Keywords that do not bear the parameter's name.
_KEYWORDS: dict[str, dict[str, str]] = {
    "take_along_dim": {"indices": "index"},
    "split": {"split_size_or_sections": "split_size"},
    **{name: {"axis": "dim"} for name in ("max", "amax", "argmax", "sum", "mean", "softmax", "log_softmax")},
}

_REDUCTIONS = ("none", "mean", "sum")


def _name(text: str) -> str:
    return _ALIASES.get(text, text)


def _params(name: str) -> tuple[str, ...]:
    """Parameters of an operation; an in-place spelling (div_, iadd) has those of the other."""
    plain = name[1:] if name in ("iadd", "isub", "imul", "itruediv") else name.rstrip("_")
    return _PARAMS.get(name) or _PARAMS.get(_name(plain)) or ("input", "*rest")


def _bind(name: str, node: Node, params: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    bound: dict[str, Any] = {}
    for i, param in enumerate(params):
        if param.startswith("*"):
            rest = args[i:]
            # view((a, b)) and view(a, b) are the same call
            if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
                rest = tuple(rest[0])
            bound[param[1:]] = tuple(rest)
            break
        if i < len(args):
            bound[param] = args[i]
    for key, value in kwargs.items():
        key = _KEYWORDS.get(name, {}).get(key, "input" if key == "self" else key)
        bound[key] = tuple(value) if isinstance(value, list) else value
    return Call(name, node, bound)


def canonical(node: Node) -> Call | None:
    """The canonical call of a node, or None for placeholders, outputs and modules without a meaning here."""
    if node.op == "call_method":
        name = _name(str(node.target))
        return _bind(name, node, _params(name), node.args, dict(node.kwargs))
    if node.op == "call_module":
        return _module_call(node)
    if node.op != "call_function":
        return None
    target = node.target
    if target is getattr and len(node.args) == 2 and isinstance(node.args[1], str):
        known = {"T": "t", "H": "t", "mT": "mT", "mH": "mT", "data": "detach"}  # from torch 2.14 on, operations of aten
        attribute = known.get(node.args[1], "attribute")
        return Call(attribute, node, {"input": node.args[0]})
    if isinstance(target, torch._ops.OpOverload):
        return _aten_call(node, target)
    name = _FUNCTIONS.get(target) or _name(getattr(target, "__name__", str(target)))
    return _bind(name, node, _params(name), node.args, dict(node.kwargs))


def _aten_call(node: Node, target: torch._ops.OpOverload) -> Call:
    name = _name(target._schema.name.split("::")[-1])
    params = _ATEN_PARAMS.get(name, _PARAMS.get(name))
    if params is None:
        params = tuple("input" if a.name == "self" else a.name for a in target._schema.arguments)
    call = _bind(name, node, params, node.args, dict(node.kwargs))
    if str(target) == "aten.index.Tensor":  # None stands for a whole dimension
        key = tuple(slice(None) if i is None else i for i in call.args["indices"])
        return Call("getitem", node, {"input": call.get("input"), "key": key})
    if isinstance(call.get("reduction"), int):
        call.args["reduction"] = _REDUCTIONS[call.args["reduction"]]
    if str(target._schema.name) in ("aten::_log_softmax", "aten::_softmax"):  # the third argument is half_to_float
        call.args.pop("dtype", None)
    return call


def _module_call(node: Node) -> Call | None:
    """Leaf modules of a symbolic trace; Dynamo inlines them."""
    owner = node.graph.owning_module
    module: Any = owner.get_submodule(str(node.target)) if owner is not None else None
    value = node.args[0] if node.args else node.kwargs.get("input")
    path = str(node.target)
    if type(module) is torch.nn.Linear:
        bias = Attr(f"{path}.bias") if module.bias is not None else None
        return Call("linear", node, {"input": value, "weight": Attr(f"{path}.weight"), "bias": bias})
    if type(module) in (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss):
        weight = Attr(f"{path}.weight") if module.weight is not None else None
        target = node.args[1] if len(node.args) > 1 else node.kwargs.get("target")
        args: dict[str, Any] = {"input": value, "target": target}
        args |= {"weight": weight, "ignore_index": module.ignore_index, "reduction": module.reduction}
        if isinstance(module, torch.nn.CrossEntropyLoss):
            return Call("cross_entropy", node, args | {"label_smoothing": module.label_smoothing})
        return Call("nll_loss", node, args)
    if type(module) is torch.nn.LogSoftmax:
        return Call("log_softmax", node, {"input": value, "dim": module.dim})
    if type(module) is torch.nn.Flatten:
        return Call("flatten", node, {"input": value, "start_dim": module.start_dim, "end_dim": module.end_dim})
    if type(module) is torch.nn.Identity:
        return Call("same", node, {"input": value})
    return None


def tensor_attr(graph: Graph, attr: Attr) -> torch.Tensor | None:
    """The tensor behind an Attr."""
    value: Any = graph.owning_module
    for part in attr.path.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, torch.Tensor) else None
