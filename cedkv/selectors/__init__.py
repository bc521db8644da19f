"""Selectors: which spans of a demo are kept. One file each; ``base`` has what they share, ``config.extensions`` their names."""
