"""Operations that are called like torch's and are not torch's: another namespace, a function that Dynamo takes into the
graph as it is, an autograd.Function, a module. Each is a body of (x, w, y) with its definitions beside it."""

from __future__ import annotations

from text_programs import Text

# name -> the signature of a custom op of that name, what it computes, and a loss that uses it as the real one is used.
OPS: dict[str, tuple[str, str, str]] = {
    "linear": ("a: Tensor, b: Tensor", "a @ (b * 2).T", "F.cross_entropy({op}(x, w), y)"),
    "matmul": ("a: Tensor, b: Tensor", "(a + 1) @ b", "F.cross_entropy({op}(x, w.T), y)"),
    "mm": ("a: Tensor, b: Tensor", "(a + 1) @ b", "F.cross_entropy({op}(x, w.T), y)"),
    "addmm": ("c: Tensor, a: Tensor, b: Tensor", "a @ b - c", "F.cross_entropy({op}(b, x, w.T), y)"),
    "t": ("a: Tensor", "a.t() * 3", "F.cross_entropy(x @ {op}(w), y)"),
    "log_softmax": ("z: Tensor, dim: int", "torch.log_softmax(z / 10, dim)", "F.nll_loss({op}(F.linear(x, w), -1), y)"),
    "_log_softmax": ("z: Tensor, dim: int", "torch.log_softmax(z / 10, dim)", "F.nll_loss({op}(F.linear(x, w), -1), y)"),
    "softmax": ("z: Tensor, dim: int", "torch.softmax(z / 10, dim)", "-({op}(F.linear(x, w), -1) * const).sum()"),
    "logsumexp": ("z: Tensor, dim: int", "z.logsumexp(dim) * 2", "{op}(F.linear(x, w), -1).mean()"),
    "cross_entropy": ("z: Tensor, y: Tensor", "F.cross_entropy(z * 2, y)", "{op}(F.linear(x, w), y)"),
    "cross_entropy_loss": ("z: Tensor, y: Tensor", "F.cross_entropy(z * 2, y)", "{op}(F.linear(x, w), y)"),
    "nll_loss": ("z: Tensor, y: Tensor", "F.nll_loss(z, (y + 1) % 37)", "{op}(F.linear(x, w).log_softmax(-1), y)"),
    "nll_loss_forward": ("z: Tensor, y: Tensor", "F.nll_loss(z, (y + 1) % 37)", "{op}(F.linear(x, w).log_softmax(-1), y)"),
    "gather": ("z: Tensor, dim: int, i: Tensor", "z.gather(dim, (i + 1) % 37)",
               "-{op}(F.linear(x, w).log_softmax(-1), 1, y[:, None]).mean()"),
    "sum": ("z: Tensor", "z.sum(0)", "{op}(F.linear(x, w).exp()).log().sum()"),
    "exp": ("z: Tensor", "(z * 0.5).exp()", "{op}(F.linear(x, w)).sum(-1).log().mean()"),
    "tanh": ("z: Tensor", "torch.tanh(z * 0.5)", "F.cross_entropy(3 * {op}(F.linear(x, w) / 3), y)"),
    "mul": ("z: Tensor, f: float", "z * f + 1 * z.flip(-1)", "F.cross_entropy({op}(F.linear(x, w), 0.5), y)"),
    "div": ("z: Tensor, f: float", "z / f + 1 * z.flip(-1)", "F.cross_entropy({op}(F.linear(x, w), 2.0), y)"),
    "add": ("z: Tensor, b: Tensor", "z - 2 * b", "F.cross_entropy({op}(F.linear(x, w), b), y)"),
    "amax": ("z: Tensor, dim: int", "z.amin(dim)", "{op}(F.linear(x, w), -1).sum()"),
    "view": ("z: Tensor", "z.flip(0).clone()", "F.cross_entropy({op}(F.linear(x, w)), y)"),
    "clone": ("z: Tensor", "z.flip(0).clone()", "F.cross_entropy({op}(F.linear(x, w)), y)"),
    "detach": ("z: Tensor", "z * 2", "F.cross_entropy({op}(F.linear(x, w)), y)"),
    "row_stats": ("z: Tensor", "z * 2", "F.cross_entropy({op}(F.linear(x, w)), y)"),
    "head_stats": ("z: Tensor", "z * 2", "F.cross_entropy({op}(F.linear(x, w)), y)"),
    "one_hot": ("y: Tensor", "F.one_hot((y + 2) % 37, 37)", "-({op}(y) * F.linear(x, w).log_softmax(-1)).sum()"),
    "masked_fill": ("z: Tensor, m: Tensor", "z.masked_fill(~m, -9.0)", "F.cross_entropy({op}(F.linear(x, w), mask), y)"),
    "index_select": ("z: Tensor, i: Tensor", "z[(i + 1) % 24]", "F.cross_entropy({op}(F.linear(x, w), picks), picks)"),
}  # fmt: skip


def _given(signature: str) -> tuple[list[str], list[str]]:
    names = [p.split(":")[0].strip() for p in signature.split(",")]
    tensors = [p.split(":")[0].strip() for p in signature.split(",") if "Tensor" in p]
    return names, tensors


def custom_op(name: str) -> str:
    """A custom op with a gradient, in a namespace of its own."""
    signature, value, _ = OPS[name]
    names, _ = _given(signature)
    typed = signature.replace("Tensor", "torch.Tensor")
    return f"""
if not hasattr(torch.ops.other_ns, "{name}"):

    def computed({signature.replace(": Tensor", "").replace(": int", "").replace(": float", "")}):
        return ({value}) + 0

    @torch.library.custom_op("other_ns::{name}", mutates_args=())
    def op({typed}) -> torch.Tensor:
        return computed({", ".join(names)}).contiguous()

    @op.register_fake
    def _({typed}):
        return computed({", ".join(names)}).contiguous()

    def setup_context(ctx, inputs, output):
        ctx.inputs = inputs

    def backward(ctx, g):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t for t in ctx.inputs]
            output = computed(*inputs)
        wanted = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
        if not output.requires_grad:
            return tuple(None for _ in inputs)
        found = iter(torch.autograd.grad(output, wanted, g))
        return tuple(next(found) if torch.is_tensor(t) and t.requires_grad else None for t in inputs)

    op.register_autograd(backward, setup_context=setup_context)
"""


def allowed_function(name: str) -> str:
    """A function of that name that Dynamo puts into its graph without looking inside."""
    signature, value, _ = OPS[name]
    names, _ = _given(signature)
    return f"""
@torch._dynamo.allow_in_graph
def {name}({", ".join(names)}):
    return {value}
"""


def autograd_function(name: str) -> str:
    """An autograd.Function of that name, with a gradient that is not the derivative of its forward."""
    signature, value, _ = OPS[name]
    names, _ = _given(signature)
    return f"""
class {name}(torch.autograd.Function):
    @staticmethod
    def forward(ctx, {", ".join(names)}):
        ctx.inputs = ({", ".join(names)},)
        return {value}

    @staticmethod
    def backward(ctx, g):
        shapes = [t.shape if torch.is_tensor(t) and t.is_floating_point() else None for t in ctx.inputs]
        return tuple(None if s is None else g.sum() * torch.ones(s, dtype=g.dtype) for s in shapes)
"""


def module(name: str) -> str:
    """A module whose forward is called so."""
    signature, value, _ = OPS[name]
    names, _ = _given(signature)
    return f"""
class {name.title()}(torch.nn.Module):
    def {name}(self, {", ".join(names)}):
        return {value}
    forward = {name}

made = {name.title()}()
"""


def programs(*ignored: int) -> dict[str, Text]:
    found = {}
    for name, (_, _, loss) in OPS.items():
        for kind, setup, call in (
            ("custom op", custom_op, f"torch.ops.other_ns.{name}"),
            ("custom op overload", custom_op, f"torch.ops.other_ns.{name}.default"),
            ("allow_in_graph", allowed_function, name),
            ("autograd.Function", autograd_function, f"{name}.apply"),
            ("module", module, "made"),
        ):
            if kind == "custom op overload" and name not in ("linear", "log_softmax", "cross_entropy"):
                continue  # the same object in the graph
            found[f"{kind} {name}"] = Text(
                f"return {loss.format(op=call)}", setup="from torch import Tensor\n" + setup(name)
            )
    return found
