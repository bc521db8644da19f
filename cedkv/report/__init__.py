"""What a run leaves for people and programs: files, tables, the verdict as text."""
