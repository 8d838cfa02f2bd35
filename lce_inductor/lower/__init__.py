"""How a row region runs: chunks of logits, and its program over each, compiled or step by step."""

# Defines ops of joint graphs that programs may hold.
import torch._inductor.inductor_prims  # noqa: F401
