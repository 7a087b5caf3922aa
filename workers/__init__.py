"""What runs on every rank: model, KV cache, expert-parallel layer, sampling."""
