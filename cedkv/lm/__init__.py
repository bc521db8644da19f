"""The language model: where it comes from, what it can do, its attention rows, its cache, its scores."""
