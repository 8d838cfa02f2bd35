"""Before autograd: logits that a graph returns beside a loss become deferred ones.

AOTAutograd would feed the backward a full-size tangent for them, so this can't wait for the joint graph, where all else
is decided. It looks at the joint graph of the end of the graph all the same: it traces that end alone.

    products.py  outputs that may be logits, and the last matrix products
    tail.py      what depends on these; in_place.py: in place, too
    trace.py     the joint graph of that
    value.py     what a returned value is, read off the traced graph
    write.py     defer_logits in its place
    stage.py     all of it
"""

from .stage import defer_returned

__all__ = ["defer_returned"]
