"""Calls of the operations between a linear and a loss, in every spelling and with every argument away from its default.

What arguments an operation has is read from torch's own schemas and signatures; a call that eager refuses is dropped.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from text_programs import Text, V
from torch import Tensor


def _names(text: str) -> list[str]:
    return text.split()


OPS = _names("""
    log_softmax _log_softmax softmax _softmax logsumexp gather take_along_dim scatter scatter_add scatter_reduce
    index_select index_put index_add index_fill nll_loss nll_loss_nd nll_loss_forward cross_entropy_loss kl_div one_hot
    where masked_fill masked_scatter clamp clamp_min clamp_max max min amax amin argmax argmin topk sort median kthvalue
    sum mean prod norm var std linalg_vector_norm linear matmul mm addmm baddbmm bmm addmv einsum tanh dropout
    special_log_softmax special_softmax logcumsumexp cumsum logaddexp add sub rsub mul div pow addcmul addcdiv lerp fmod
    nan_to_num softplus gelu binary_cross_entropy_with_logits expand repeat narrow slice select index squeeze unsqueeze
    flatten permute transpose movedim roll flip
""")
FUNCTIONS = _names("""
    linear bilinear cross_entropy nll_loss kl_div log_softmax softmax softmin gumbel_softmax logsigmoid dropout
    alpha_dropout one_hot binary_cross_entropy binary_cross_entropy_with_logits normalize layer_norm softplus hardtanh
    multi_margin_loss soft_margin_loss mse_loss l1_loss smooth_l1_loss huber_loss poisson_nll_loss gaussian_nll_loss
    cosine_similarity threshold linear_cross_entropy
""")
CLASSES = ("CrossEntropyLoss", "NLLLoss", "KLDivLoss", "LogSoftmax", "Softmax", "MultiMarginLoss", "SoftMarginLoss")

PREFIX = """
z = F.linear(x, w)
lp = z.log_softmax(-1)
p = z.softmax(-1)
yk = y[:, None]
""".strip()

# Values by the argument's name, otherwise by its type. The first fits most calls.
MATRICES = ("z", "lp", "p", "(z * 0.5)")
BY_NAME: dict[str, tuple[str, ...]] = {
    "self": MATRICES, "input": MATRICES, "target": ("y", "soft", "ignored", "y.int()", "lp.detach()"),
    "index": ("yk", "many", "ids", "y", "yk[:5]", "y[:6] % 6"), "indices": ("yk", "many", "y[:1, None]"),
    "src": ("const", "z * 0.1", "const[:, :3]"), "values": ("const[:, 0]", "const[0, 0]", "z[:, 1]"),
    "source": ("const", "const.flatten()"), "mask": ("mask", "mask_rows[:, None]", "mask_classes"),
    "condition": ("mask", "mask_rows[:, None]", "mask_classes"), "weight": ("None", "classes", "w", "0.3", "gain"),
    "pos_weight": ("None", "classes"), "bias": ("None", "b"), "value": ("0.5", "-2", "scale.detach()", "1.5"),
    "other": ("const", "2.5", "gain", "row[:, None]", "w.T", "-0.5", "scale"), "mat2": ("w.T", "w2.t()"),
    "mat1": ("x",), "mat": ("w",), "vec": ("x[0]",), "batch1": ("x3",), "batch2": ("w.T.expand(4, 8, 37)",),
    "dim": ("-1", "1", "0", "-2"), "start_dim": ("0", "-2"), "end_dim": ("-1", "1"), "dim0": ("0", "-1"),
    "dim1": ("1", "-2"), "keepdim": ("True", "False"), "k": ("3", "1", "37"), "reduction": ("1", "2", "0"),
    "ignore_index": ("-100", "3", "-1"), "label_smoothing": ("0.1", "0.0", "1.0"), "log_target": ("True", "False"),
    "num_classes": ("37", "40", "-1"), "alpha": ("2.5", "-1", "2"), "beta": ("0.5", "2", "0"), "p": ("2", "1", "0.3"),
    "ord": ("2", "1", "3.0"), "min": ("-0.5", "None", "const - 1"), "max": ("0.7", "None", "const + 1"),
    "train": ("True", "False"), "training": ("True", "False"), "unbiased": ("False", "True"),
    "correction": ("0", "2", "1"), "descending": ("True", "False"), "stable": ("True", "False"),
    "largest": ("False", "True"), "sorted": ("False", "True"), "accumulate": ("True", "False"),
    "half_to_float": ("False", "True"), "include_self": ("False", "True"), "sparse_grad": ("True", "False"),
    "reduce": ('"sum"', '"add"', '"multiply"', '"prod"', '"amax"', '"amin"', '"mean"', "False", "True"),
    "size_average": ("False", "True", "None"), "rounding_mode": ('"floor"', '"trunc"', "None"),
    "approximate": ('"tanh"', '"none"'), "end": ("const", "20"), "tensor1": ("const", "gain"),
    "tensor2": ("p", "gain", "row[:, None]"), "exponent": ("2", "3", "const.abs()"), "threshold": ("0.5", "20"),
    "size": ("(24, 37)", "(-1, 37)", "(2, 24, 37)"), "repeats": ("(1, 1)", "(2, 1)", "(1, 2)"), "start": ("2", "-9"),
    "length": ("5", "7"), "step": ("2", "3"), "dims": ("(1, 0)", "(0, 1)", "0", "(0,)"), "shifts": ("1", "-2"),
    "source_": ("0",), "destination": ("-1", "0"), "equation": ('"nh,vh->nv"', '"ah,bh->ba"', '"ah,bh->b"'),
    "tensors": ("[x, w]",), "nan": ("0.5",), "posinf": ("2.0",), "neginf": ("-2.0",), "inplace": ("True", "False"),
    "hard": ("True", "False"), "tau": ("0.7",), "eps": ("1e-3", "1e-12"), "margin": ("0.5", "1.0"),
    "normalized_shape": ("(37,)",), "min_val": ("-0.5",), "max_val": ("0.7",), "log_input": ("False", "True"),
    "full": ("True", "False"), "var": ("p",), "delta": ("0.7",), "input1": ("x",), "input2": ("w",), "x1": ("z",),
    "x2": ("const",), "linear_weight": ("w",), "linear_bias": ("None", "b"), "out_dtype": ("torch.float64",),
    "test_element": ("1.0",), "upscale": ("None",), "chunking_method": ("None",),
}  # fmt: skip
BY_TYPE: dict[str, tuple[str, ...]] = {
    "Tensor": ("const", "z"), "Optional[Tensor]": ("None", "gain"), "int": ("1", "0", "-1"), "bool": ("True", "False"),
    "float": ("0.5", "1.5"), "number": ("0.5", "2", "-1.5"), "Optional[int]": ("-1", "0", "None"),
    "List[int]": ("[-1]", "[0]", "[0, 1]", "[1]"), "Optional[List[int]]": ("[-1]", "[0]", "[0, 1]", "None"),
    "Optional[bool]": ("True", "False"), "Optional[float]": ("0.5",), "Optional[number]": ("2", "None", "0.5"),
}  # fmt: skip
DTYPES = ("torch.float64", "torch.float32", "None")
BY_OP: dict[tuple[str, str], tuple[str, ...]] = {
    ("one_hot", "self"): ("y",), ("one_hot", "input"): ("y",), ("one_hot", "tensor"): ("y",),
    ("nll_loss", "self"): ("lp", "p", "z"), ("nll_loss", "input"): ("lp", "z"), ("nll_loss_nd", "self"): ("lp", "z"),
    ("nll_loss_forward", "self"): ("lp", "z"), ("kl_div", "self"): ("lp",), ("kl_div", "input"): ("lp",),
    ("kl_div", "target"): ("soft", "soft.log()", "const.softmax(-1)"), ("linear", "input"): ("x", "x3", "x[0]"),
    ("linear", "weight"): ("w", "w[0]"), ("matmul", "self"): ("x", "x3", "x[0]"), ("matmul", "other"): ("w.T", "w[3]"),
    ("mm", "self"): ("x",), ("bmm", "self"): ("x3",), ("bmm", "mat2"): ("w.T.expand(4, 8, 37)",),
    ("addmm", "self"): ("b", "const", "row[:, None]", "scale"), ("addmm", "mat2"): ("w.T",),
    ("baddbmm", "self"): ("b", "z.view(4, 6, 37)", "scale"), ("addmv", "self"): ("b",),
    ("binary_cross_entropy", "input"): ("p",), ("cross_entropy", "reduction"): ('"sum"', '"none"', '"mean"'),
    ("index_put", "indices"): ("(y[:6] % 6,)", "(mask_rows,)", "(None, y[:5])", "(ids[:, 0] % 24, y)", "[mask]"),
    ("index", "indices"): ("[y % 24]", "[None, y[:5]]", "[ids[:, 0], y]", "[mask_rows]"),
    ("index_select", "index"): ("y % 24", "ids[0]", "y[:5]"), ("index_fill", "index"): ("y[:4]", "ids[0, :3]"),
    ("index_add", "index"): ("torch.arange(24)", "torch.arange(37)"), ("gaussian_nll_loss", "target"): ("const",),
    ("scatter_add", "src"): ("const", "z * 0.1"), ("linear_cross_entropy", "input"): ("x",),
    ("movedim", "source"): ("0", "-1"), ("einsum", "path"): ("None",), ("norm", "p"): ("2", "1", "None", "3.0"),
    ("multi_margin_loss", "p"): ("1", "2"), ("softplus", "beta"): ("2", "0.5"), ("gelu", "approximate"): ('"tanh"',),
}  # fmt: skip
WORDS = ('"none"', '"mean"', '"sum"', '"batchmean"')


def _values(op: str, name: str, kind: str) -> tuple[str, ...]:
    if (op, name) in BY_OP:
        return BY_OP[op, name]
    if name == "dtype":
        return DTYPES
    if name == "reduction" and kind != "int":
        return WORDS
    if name == "dim" and "List" in kind:
        return BY_TYPE["List[int]"] + ("-1", "1")
    if name in BY_NAME:
        return BY_NAME[name]
    if kind.startswith("Optional[Tensor]"):
        return BY_TYPE["Optional[Tensor]"]
    return BY_TYPE.get(kind, ())


def _arguments(
    op: str, rng: random.Random, listed: list[tuple[str, str, bool, bool]]
) -> list[tuple[str, str, bool]] | None:
    """Values of a call as (name, value, keyword): those required, and each optional one with even odds."""
    chosen = []
    keyword = False
    for name, kind, required, only in listed:
        values = _values(op, name, kind)
        if not values:
            if required:
                return None
            keyword = True
            continue
        if not required and rng.random() < 0.45:
            keyword = True  # what follows can no longer be given by position
            continue
        keyword = keyword or only or (not required and rng.random() < 0.4)
        chosen.append((name, values[0] if rng.random() < 0.4 else rng.choice(values), keyword))
    return chosen


def _call(function: str, given: list[tuple[str, str, bool]]) -> str:
    return f"{function}({', '.join(f'{n}={v}' if k else v for n, v, k in given)})"


def calls(rng: random.Random) -> Iterator[str]:
    """Expressions, endlessly; many of them are not valid."""
    while True:
        kind = rng.random()
        if kind < 0.25:
            yield from _function(rng)
        elif kind < 0.3:
            yield from _module(rng)
        else:
            yield from _schema(rng)


def _function(rng: random.Random) -> Iterator[str]:
    name = rng.choice(FUNCTIONS)
    function = getattr(F, name, None)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return
    empty = inspect.Parameter.empty
    listed = [
        (p.name, "Tensor" if p.default is empty else "", p.default is empty, p.kind is p.KEYWORD_ONLY)
        for p in parameters
        if p.name != "_stacklevel"
    ]
    given = _arguments(name, rng, listed)
    if given is not None:
        yield _call(f"F.{name}", given)


def _module(rng: random.Random) -> Iterator[str]:
    name = rng.choice(CLASSES)
    parameters = inspect.signature(getattr(torch.nn, name)).parameters.values()
    given = _arguments(
        "cross_entropy" if name == "CrossEntropyLoss" else "", rng, [(p.name, "", False, False) for p in parameters]
    )
    source = rng.choice(("z", "lp", "(z * 2)"))
    target = "" if "max" in name else f", {rng.choice(('y', 'soft', 'ignored'))}"
    if given is not None:
        yield f"{_call(f'torch.nn.{name}', [(n, v, True) for n, v, _ in given])}({source}{target})"


def _schema(rng: random.Random) -> Iterator[str]:
    op = rng.choice(OPS)
    packet = getattr(torch.ops.aten, op, None)
    if packet is None:
        return
    overload = getattr(packet, rng.choice(packet.overloads()))
    arguments = overload._schema.arguments
    if not arguments or any("Dimname" in str(a.type) for a in arguments):
        return
    out = [a.name for a in arguments if a.is_out]
    listed = [(a.name, str(a.type), not a.has_default_value(), a.kwarg_only) for a in arguments if not a.is_out]
    given = _arguments(op, rng, listed)
    if not given:
        return
    if out:
        given = given + [(n, "torch.empty(0, dtype=torch.float64)", True) for n in out]
    spellings = [f"aten.{op}.{overload._overloadname}", f"aten.{op}"]
    spellings += [
        f"{p}.{op}" for p, m in (("torch", torch), ("F", F), ("torch._C._nn", torch._C._nn)) if hasattr(m, op)
    ]
    if op.startswith("special_"):
        spellings.append(f"torch.special.{op.removeprefix('special_')}")
    if op.startswith("linalg_"):
        spellings.append(f"torch.linalg.{op.removeprefix('linalg_')}")
    elif hasattr(torch.special, op):
        spellings.append(f"torch.special.{op}")
    first = given[0][1]
    methods = [m for m in (op, f"{op}_") if hasattr(Tensor, m) and not given[0][2] and first.isidentifier()]
    spelling = rng.choice(spellings + methods * 2)
    if spelling in methods:
        # An in-place method on a copy, or on the logits themselves.
        base = f"{first}.clone()" if spelling.endswith("_") and rng.random() < 0.5 else first
        yield _call(f"{base}.{spelling}", given[1:])
    else:
        yield _call(spelling, given)


def tail(r: Any, rng: random.Random) -> str:
    """A loss of what a call gave: logits again where it looks like them, a projection otherwise."""
    if isinstance(r, (tuple, list)):
        index = rng.choice([i for i, t in enumerate(r) if isinstance(t, Tensor)] or [0])
        return f"r = r[{index}]\n{tail(r[index], rng)}" if r else "r = z.sum()"
    if not isinstance(r, Tensor):
        return f"r = z.sum() * {r!r}" if isinstance(r, float) else "r = z.sum()"
    if not r.is_floating_point():
        if r.shape == (24,) and rng.random() < 0.5:
            return "r = (r == y).double().mean()"
        if r.dim() == 2 and r.shape[0] == 24 and r.dtype == torch.int64 and rng.random() < 0.5:
            return "r = lp.gather(1, r.clamp(0, 36)).mean()"
        return "r = r.double().mean()"
    if r.shape == (24, V):
        return rng.choice(
            (
                "r = F.cross_entropy(r, y)", "r = F.nll_loss(r, y)", "r = (r * const).sum()", "r = r.logsumexp(-1).sum()",
                "r = r.gather(1, yk).sum()", "r = -(r * lp).sum(-1).mean()", "r = r.log_softmax(-1).gather(1, yk).mean()",
                "r = -(r * soft).sum()", "r = r.sum(-1).square().mean()",
            )
        )  # fmt: skip
    if r.dim() and r.shape[-1] == V:
        return rng.choice(
            ("r = r.logsumexp(-1).square().sum()", "r = (r * gain).sum()", "r = r.log_softmax(-1)[..., 3].sum()")
        )
    if r.shape == (24,):
        return rng.choice(("r = (r * weights).sum()", "r = r.square().mean()", "r = r.mean()", "r = (r * row).sum()"))
    return rng.choice(("r = r.square().sum()", "r = r.sum()", "r = r.mean()"))


def programs(seed: int) -> Iterator[Text]:
    rng = random.Random(seed)
    for call in calls(rng):
        beside = " + 0.1 * F.cross_entropy(z, y)" if rng.random() < 0.3 else ""
        text = Text(f"{PREFIX}\nr = {call}\nreturn r")
        fn, _ = text.functions()
        torch.manual_seed(0)
        try:
            r = fn(*text.inputs())
        except Exception:  # not a call that eager takes
            continue
        grad = rng.random() < 0.9
        dtype = "float32" if rng.random() < 0.15 else "float64"
        yield Text(f"{PREFIX}\nr = {call}\n{tail(r, rng)}\nreturn r{beside}", dtype=dtype, grad=grad)
