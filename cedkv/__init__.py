"""cedkv: can a few spans of a demonstration's KV cache replace the whole demonstration, and do no harm elsewhere?"""

__version__ = "0.1.0"
