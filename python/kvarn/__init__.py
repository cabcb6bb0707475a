"""kvarn: a quantised KV cache for LLM inference."""
