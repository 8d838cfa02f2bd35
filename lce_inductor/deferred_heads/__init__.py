"""Logits that wait for their loss: an eager head's, which a compiled function takes as the head itself."""
