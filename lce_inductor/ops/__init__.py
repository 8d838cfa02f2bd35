"""The fused op: schema and autograd, chunk plan, and one implementation per kind of device."""
