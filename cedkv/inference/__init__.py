"""Forward passes: teacher, prefix, student."""
