"""Names of the reason codes that the corpus expects; one place to change when the package renames one."""

ESCAPE = "escape"  # an operation without a rule reads the logits
MUTATED = "mutated"  # in-place change of the logits, of an alias, or of x or weight, whose meaning is uncertain
SOFT_TARGETS = "soft-targets"  # the targets are class probabilities
TWO_HEADS = "two-heads"  # KL or another divergence between the distributions of two heads
MARGIN = "margin"  # CosFace, ArcFace: the margin is scattered into the logits
CLASS_DIM = "class-dim"  # the softmax does not run over the class dimension
TOO_SMALL = "too-small"  # below min_logits_bytes
DTYPE = "dtype"  # a dtype that the op does not take
LAYOUT = "class-dim"  # a view that mixes the class dimension with others
ORDER = "order"  # an input of the loss cannot be moved before the linear
NO_LOSS = "no-loss"  # the graph holds a linear and no loss reads it
RETURNED = "returned-loss-free"  # the logits leave the graph and no loss in it reads them
GRADIENT = "gradient"  # a statistic that the op gives without gradient needs one
LORA = "lora"  # the logits are a sum of a linear and of a low-rank product
CLASS_MASK = "class-mask"  # logits changed by a mask over the classes that is not a constant slice
SUM_OF_HEADS = "sum-of-heads"  # the logits are a sum of several linears
ROW_SCALE = "row-scale"  # a factor or an offset per row

UNSEEN = "unseen"  # not a code: nothing was recorded, since the product was not taken for a head

ALL = tuple(v for k, v in list(globals().items()) if k.isupper())
