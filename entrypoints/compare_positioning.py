"""``mlflow run . -e compare_positioning``: not yet."""

import sys

if __name__ == "__main__":
    sys.exit("compare_positioning is not there yet; run phase2_eval once per condition and compare the runs in the MLflow UI")
