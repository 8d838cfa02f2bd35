"""defer(): a head whose logits wait for the loss that reads them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ..install import current_config

if TYPE_CHECKING:
    from torch import nn


class Deferred:
    """What defer() did to a module, and the way back: remove(), or the end of a with-block."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def remove(self) -> None:
        """The module computes its logits again. Those that are pending stay so."""
        if _is_deferred(self.module):
            del self.module.forward

    def __enter__(self) -> Deferred:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()


def defer(module: nn.Module) -> Deferred:
    """Let the logits of a head that runs apart from its loss wait for it.

    lce_inductor.install()
    lce_inductor.defer(model.lm_head)

    The module's output, called in eager, is a tensor of the logits' shape [..., V] and dtype that is not computed.
    Given to a compiled function, it is taken apart there: the product of hidden states [..., H] and weight [V, H]
    stands in that function's graph, beside its loss, and gradients go back to both. F.cross_entropy (and
    nn.CrossEntropyLoss) of it is compiled wherever it is called. Slices of rows, views, casts and scalings by numbers
    are pending, too. Anything else computes the logits, with a gradient as eager's; report() counts that.

    In a compiled model the head runs between two graphs. Heads smaller than install(min_logits_bytes=...), DTensors
    and other subclasses are computed as always.

    Args:
        module: one without children that calls F.linear, such as nn.Linear; or a model whose
            get_output_embeddings() is one (transformers).

    Returns:
        Deferred: its remove() takes this back.

    Raises:
        TypeError: the module is none of these.
        RuntimeError: install() was not called.
    """
    if current_config() is None:
        raise RuntimeError("lce_inductor.defer() needs lce_inductor.install() before it: no pass would see the head")
    from .linear import forward

    head = _head_of(module)
    if not _is_deferred(head):
        if "forward" in head.__dict__:
            raise TypeError(f"defer(): the forward of {type(head).__name__} was replaced, by {head.forward!r}")
        # A partial, and not a closure: copies and pickles of the module hold their own.
        head.forward = functools.partial(forward, head)
    return Deferred(head)


def _is_deferred(module: nn.Module) -> bool:
    from .linear import forward

    found = module.__dict__.get("forward")
    return isinstance(found, functools.partial) and found.func is forward


def _head_of(module: Any) -> nn.Module:
    from torch import nn

    if not isinstance(module, nn.Module):
        raise TypeError(f"defer() takes a module, got {type(module).__name__}")
    module = getattr(module, "_orig_mod", module)
    find = getattr(module, "get_output_embeddings", None)
    head: nn.Module = find() if callable(find) else module
    # What computes a weight (weight_norm) is not what computes logits.
    children = [n for n, _ in head.named_children() if n != "parametrizations"] if isinstance(head, nn.Module) else [""]
    if children:
        raise TypeError(
            f"defer() takes a head, such as model.lm_head: a module without children, got {type(head).__name__}"
        )
    return head
