"""Names of the reason codes that the corpus expects; one place to change when the package renames one."""

CROSSING = "crossing"  # several rows of logits are read at once
PRODUCT = "product"  # a matrix product of the forward reads logits that a loss reads, too
RANDOM = "random"  # dropout or noise on the logits
RETURNED = "returned"  # the logits, or a value for each class, leave the graph
ROWS_DIFFER = "rows-differ"  # labels that may have another number of rows
RETURNED_UNREAD = "returned-loss-free"  # the logits are returned, and no loss of this graph reads them
ONE_ROW = "one-row"  # no matrix of logits with rows
NO_LOSS = "no-loss"  # nothing reduces the logits
TOO_SMALL = "too-small"  # below min_logits_bytes

UNSEEN = "unseen"  # not a code: nothing was counted, since the product was not taken for a head
