"""The entry points of MLproject: thin commands over ``cedkv.cli.app``."""
