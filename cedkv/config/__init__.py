"""Configuration: schema, registries of choices by name, short names of keys, and reading."""
