"""Blended prefill: KV of spans reused anywhere in a prompt, with a chosen share of tokens computed again."""
