"""Where samples come from, and how text becomes tokens."""
