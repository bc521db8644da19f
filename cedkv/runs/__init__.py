"""A run from start to end: manifest, journal, lifecycle, MLflow, pipeline."""
