"""How a row region runs: chunks of logits, and its program over each, compiled or step by step."""
