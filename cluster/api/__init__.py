"""Text in and out: tokenizer, OpenAI protocol, metrics."""
