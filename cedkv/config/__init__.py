"""The configuration: its schema, where it is read from, its short names."""
