"""Text in and out of models: tokenizers, and the rules of writing more of it."""
