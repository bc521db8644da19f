"""``mlflow run . -e ablate_selector``: not yet."""

import sys

if __name__ == "__main__":
    sys.exit("ablate_selector is not there yet; run phase2_eval once per condition and compare the runs in the MLflow UI")
