"""What a head reads, changed in place after it was read: inside the program, before or after the loss, or between the
call and the backward. The loss is that of the values at the time of the read; what autograd forbids stays forbidden."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from text_programs import Text

SETUP = """
if not hasattr(torch.ops.lce_tests, "mutate_"):

    @torch.library.custom_op("lce_tests::mutate_", mutates_args=("t",))
    def mutate_(t: torch.Tensor) -> None:
        t.copy_(t.flip(0))

"""
INTS = (
    "{v}.copy_({v}.flip(0))", "{v}.fill_(3)", "{v}.add_(1).remainder_(24)", "{v}[0] = 5", "{v}[:3] = {v}[3:6].clone()",
    "{v}.view(-1)[1:4].zero_()", "torch.add({v}, 1, out={v}).clamp_(0, 23)", "torch.ops.lce_tests.mutate_({v})",
    "{v}.index_put_((torch.tensor([0, 2]),), torch.tensor(7))", "{v}.masked_fill_({v} > 4, 2)", "{v}.zero_()",
    "{v}.index_fill_(0, torch.tensor([1, 3]), 6)", "torch._foreach_copy_([{v}], [{v}.flip(0)])", "{v}.mul_(2).remainder_(23)",
    "{v}.scatter_(0, torch.tensor([0, 1]), 9)", "{v}.random_(0, 5)", "{v}[::2].add_(1).remainder_(24)", "{v}.unsqueeze(0).zero_()",
)  # fmt: skip
BOOLS = (
    "{v}.logical_not_()", "{v}.fill_(False)", "{v}.zero_()", "{v}.copy_({v}.flip(0))", "{v}[0] = True", "{v}[:3] = False",
    "torch.logical_not({v}, out={v})", "torch.ops.lce_tests.mutate_({v})", "{v}.bitwise_xor_(torch.ones_like({v}))",
    "{v}.view(-1)[2:5].logical_not_()", "{v}.masked_fill_({v}, False)",
)  # fmt: skip
FLOATS = (
    "{v}.mul_(2)", "{v}.add_(1)", "{v}.fill_(0.5)", "{v}.copy_({v}.flip(0))", "{v}.zero_()", "{v}[0] = 2.0", "{v}[:1].mul_(3)",
    "torch.mul({v}, 1.5, out={v})", "torch.ops.lce_tests.mutate_({v})", "{v}.view(-1)[1:3].add_(1)", "{v}.clamp_(min=0.6)",
    "torch._foreach_mul_([{v}], 0.5)", "{v}.index_fill_(0, torch.tensor([0]), 1.5)", "{v}.exp_()", "{v}.t().add_(1)", "{v}.div_(3)",
    "{v}.addcmul_({v}, {v})", "{v}.masked_fill_({v} > 0.8, 0.9)", "{v}.lerp_({v}.flip(0), 0.4)", "torch.exp({v}, out={v})",
)  # fmt: skip

# operand: what kind it is, how the logits are read with it (s), or how the loss is (r).
READS: dict[str, tuple[str, tuple[str, ...]]] = {
    "y": ("int", ("r = F.cross_entropy(z, {v})", "r = -z.log_softmax(-1).gather(1, {v}[:, None]).mean()",
                  "r = F.nll_loss(z.log_softmax(-1), {v})", "r = (z.logsumexp(-1) - z[torch.arange(24), {v}]).sum()",
                  "r = -(F.one_hot({v}, 37) * z.log_softmax(-1)).sum()", "s = z[{v} % 24]", "s = z.index_select(0, {v} % 24)",
                  "r = F.cross_entropy(z, {v}, reduction='none')", "r = z.scatter(1, {v}[:, None], 0.5).logsumexp(-1).sum()",
                  "r = z.take_along_dim({v}[:, None], 1).square().sum()",
                  "r = F.kl_div(z.log_softmax(-1), torch.zeros_like(z).scatter_(1, {v}[:, None], 1.0), reduction='sum')")),
    "picks": (
        "int",
        ("s = z[{v}]", "s = z.index_select(0, {v})", "s = F.linear(x[{v}], w)", "s = z[{v}][:, {v}]", "s = z[:, {v}]", "s = aten.index.Tensor(z, [{v}])", "r = F.cross_entropy(z[{v}], y[{v}])", "s = z.view(4, 6, 37)[:, {v} % 6].flatten(0, 1)"),
    ),
    "ids": ("int", ("s = z[{v}[0]]", "s = z.index_select(0, {v}[0])", "r = z.gather(1, {v}).logsumexp(-1).sum()",
                    "s = z[{v}[:, 0]]", "s = z.index_select(0, {v}[0, :6])", "s = z[:, {v}[0]]")),
    "mask": ("bool", ("s = z.masked_fill({v}, -1e4)", "s = torch.where({v}, z, -1e4)", "s = torch.where({v}, z, z * 0.5)",
                      "s = z * {v}", "s = z + {v} * 2.0")),
    "mask_classes": ("bool", ("s = z.masked_fill({v}, -1e4)", "s = torch.where({v}, -1e4, z)", "s = z * ~{v}",
                              "s = z.masked_fill({v}[None], -1e4)")),
    "mask_rows": ("bool", ("r = (F.cross_entropy(z, y, reduction='none') * {v}).sum()", "s = z.masked_fill({v}[:, None], 0)",
                           "r = F.cross_entropy(z, torch.where({v}, y, -100), reduction='sum')",
                           "r = (z.logsumexp(-1) * {v}).sum() / {v}.sum().clamp(min=1)",
                           "r = torch.where({v}, z.logsumexp(-1), 0.0).sum()")),
    "b": ("float", ("s = z + {v}", "s = torch.add(z, {v}, alpha=2)", "s = z * {v}", "s = F.linear(x, w, {v})",
                    "s = torch.addmm({v}, x, w.T)")),
    "temp": ("float", ("s = z / {v}[:, None]", "s = z * {v}.unsqueeze(1)", "s = z.div({v}[:, None])",
                       "s = (x / {v}[:, None]) @ w.T")),
    "row": ("float", ("s = z * {v}[:, None]", "s = z - {v}[:, None]", "r = (z.logsumexp(-1) * {v}).sum()")),
    "scale": ("float", ("s = z * {v}", "s = z / {v}", "r = F.cross_entropy(z, y) * {v}", "s = {v} * torch.tanh(z / {v})",
                        "s = F.linear(x * {v}, w)")),
    "weights": ("float", ("r = (F.cross_entropy(z, y, reduction='none') * {v}).sum()", "r = (z.logsumexp(-1) * {v}).mean()",
                          "r = (F.cross_entropy(z, y, reduction='none') / {v}).sum() / {v}.sum()")),
    "classes": ("float", ("r = F.cross_entropy(z, y, {v})", "r = F.nll_loss(z.log_softmax(-1), y, {v})", "s = z + {v}.log()",
                          "r = -(z.log_softmax(-1) * {v}).sum(-1).mean()")),
    "soft": ("float", ("r = F.cross_entropy(z, {v})", "r = F.kl_div(z.log_softmax(-1), {v}, reduction='sum')",
                       "r = -({v} * z.log_softmax(-1)).sum()")),
    "x": ("float", ("s = F.linear({v}, w)", "s = {v} @ w.T", "s = torch.addmm(b, {v}, w.T)", "r = F.cross_entropy(F.linear({v}, w), y)")),
    "w": ("float", ("s = F.linear(x, {v})", "s = x @ {v}.T", "s = torch.addmm(b, x, {v}.t())", "r = F.cross_entropy(F.linear(x, {v}), y)",
                    "s = F.linear(x3, {v}).flatten(0, 1)")),
    "z": ("float", ("s = z * 2", "r = F.cross_entropy(z, y)", "s = z.log_softmax(-1)", "r = z.logsumexp(-1).sum()", "s = z[:, :30]",
                    "s = z.clone()", "s = z.view(4, 6, 37)[:, 1:].flatten(0, 1)", "s = z.detach()")),
    "s2": ("float", ("s = s2.log_softmax(-1)", "r = s2.logsumexp(-1).sum()", "s = s2 * 1.5")),
}  # fmt: skip
LOSSES = (
    "r = F.cross_entropy(s, torch.arange(s.shape[0]) % s.shape[-1])", "r = s.logsumexp(-1).square().sum()",
    "r = s.log_softmax(-1)[:, 2].sum()", "r = F.cross_entropy(s, torch.full((s.shape[0],), 3), reduction='none')",
    "r = -(s.softmax(-1) * s.log_softmax(-1)).sum(-1).mean()", "r = s.gather(1, torch.arange(s.shape[0])[:, None] % s.shape[1]).sum()",
)  # fmt: skip


def programs(seed: int) -> Iterator[Text]:
    rng = random.Random(seed)
    while True:
        name = rng.choice(list(READS))
        kind, reads = READS[name]
        change = rng.choice({"int": INTS, "bool": BOOLS, "float": FLOATS}[kind])
        read = rng.choice(reads)
        # Read through a copy, through a view of the input, or directly.
        lines = ["z = F.linear(x, w)"]
        v = name
        if name == "s2":
            lines.append("s2 = z.view_as(z)" if rng.random() < 0.5 else "s2 = z[:20]")
        elif name != "z" and rng.random() < 0.6:
            v = "v"
            lines.insert(
                rng.randint(0, 1),
                f"v = {name}{rng.choice(('.clone()', '.clone()', '.detach().clone()', ' + 0', ' * 1'))}",
            )
            if kind == "bool":
                lines[-1 if lines[-1].startswith("v") else 0] = f"v = {name}.clone()"
        if rng.random() < 0.3:
            change = change.replace("{v}", "u")
            lines.append(f"u = {v}{rng.choice(('[:]', f'.view_as({v})', '[...]'))}")
        change = change.format(v=v)
        if rng.random() < 0.4 and kind == "float":
            change = f"with torch.no_grad():\n    {change}"
        lines.append(read.format(v=v))
        loss = [] if read.startswith("r") else [rng.choice(LOSSES)]
        where = rng.random()
        between = ""
        if where < 0.55:
            lines += [change, *loss]
        elif where < 0.75:
            lines += [*loss, change]
        elif v in ("v", "z", "s2") or "u" in change.split(".")[0]:
            lines += [change, *loss, change]
        else:
            lines += loss
            between = change.replace("with torch.no_grad():\n    ", "")
        tail = rng.choice(("r", "r", f"r + 0 * {v}.sum()", "r + 0.1 * F.cross_entropy(z, y)"))
        body = "\n".join([*lines, f"return {tail}"])
        text = Text(
            body, setup=SETUP if "lce_tests" in body + between else "", between=between, grad=rng.random() < 0.6
        )
        for grad in (text.grad, False):
            if _runs(text._replace(grad=grad, between="")):
                yield text._replace(grad=grad)
                break


def _runs(text: Text) -> bool:
    """Whether eager takes it, the backward too."""
    try:
        fn, _ = text.functions()
        with torch.set_grad_enabled(text.grad):
            r = fn(*text.inputs())
        if r.requires_grad:
            r.sum().backward()
    except Exception:
        return False
    return True
