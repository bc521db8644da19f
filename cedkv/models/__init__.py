"""Loading a model: what it can do, its tokenizer, its devices, its fingerprint."""
