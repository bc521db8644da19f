"""What knows no model: values, errors, text, files, random draws, registries."""
