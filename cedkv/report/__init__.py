"""What a run leaves for people and programs: files, tables, figures, the page."""
