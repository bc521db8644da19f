"""The entry points of MLproject, as thin commands over ``cedkv.cli.app``."""
