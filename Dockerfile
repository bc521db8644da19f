# Two images, both with the versions that conda.yaml pins:
#   docker build --target mlflow-server -t cedkv-mlflow-server .     the MLflow server of compose.yaml
#   docker build -t cedkv .                                          cedkv with Ray, for deploy/kuberay.yaml and deploy/mlflow-kubernetes
FROM python:3.11-slim AS pins
WORKDIR /opt/cedkv
COPY conda.yaml .
RUN sed -n 's/^ *- \([A-Za-z].*==.*\)$/\1/p' conda.yaml > pins.txt
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 cedkv

FROM pins AS mlflow-server
RUN grep -E '^(boto3|mlflow|psycopg2-binary)==' pins.txt > server.txt && pip install -r server.txt
USER cedkv
WORKDIR /home/cedkv

FROM pins AS cedkv
# git: MLflow reads the commit of a run; wget: KubeRay's health checks.
RUN apt-get update && apt-get install --yes --no-install-recommends git wget && rm -rf /var/lib/apt/lists/*
RUN pip install -r pins.txt --constraint pins.txt 'ray[default]>=2.50,<3'
COPY . .
RUN pip install --no-deps --editable .
# The entry points of MLproject are no part of the package.
ENV PYTHONPATH=/opt/cedkv
USER cedkv
WORKDIR /home/cedkv
