"""Where a run goes in MLflow: its experiment, and a run that was made for it beforehand, both checked before they are used.

Calls are made with the client that ``runs.tracking`` gives; mlflow is not imported.
"""

from __future__ import annotations

from typing import Any

from cedkv.core.errors import ConfigError
from cedkv.core.text import plural, preview, redact

ORIGIN = "cedkv.origin"
"""The tag that holds ``RunManifest.origin`` from the moment a run is this package's."""
_NONE_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes where nothing has such an id, and where nothing could have it."""


def find_experiment(client: Any, name: str | None, experiment_id: str | None) -> str:
    """Return the id of an experiment that takes runs; one that is named and not there is created.

    Args:
        name, experiment_id: at least one; where both are given, they must be of one experiment.

    Raises:
        ConfigError: there is none with this id, it was deleted, or name and id are of two.
    """
    experiment = _by_name(client, str(name)) if experiment_id is None else _by_id(client, experiment_id)
    if name is not None and experiment.name != name:
        raise ConfigError(
            f"MLFLOW_EXPERIMENT_ID = {preview(experiment_id)} is experiment {preview(experiment.name)}, and "
            f"MLFLOW_EXPERIMENT_NAME = {preview(name)} is another one: unset one of the two"
        )
    if experiment.lifecycle_stage == "deleted":
        raise ConfigError(
            f"experiment {preview(experiment.name)} (id {experiment.experiment_id}) was deleted in MLflow at {_store(client)} "
            f"and takes no run; bring it back: mlflow experiments restore --experiment-id {experiment.experiment_id}, or name "
            "another one (MLFLOW_EXPERIMENT_NAME)"
        )
    return str(experiment.experiment_id)


def find_by_origin(client: Any, experiment_id: str, origin: str) -> Any:
    """Return the run of an experiment that was made for a manifest; None where there is none, or where it was deleted."""
    runs = client.search_runs([experiment_id], f"tags.`{ORIGIN}` = '{origin}'", max_results=1)
    return runs[0] if runs else None


def existing_run(client: Any, run_id: str) -> Any:
    """Return a run that can be logged to.

    Raises:
        ConfigError: there is no such run, or it was deleted.
    """
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if _code(error) not in _NONE_THERE:
            raise
        raise ConfigError(
            f"run {run_id} is not in MLflow at {_store(client)}: set MLFLOW_TRACKING_URI to where it is"
        ) from None
    if run.info.lifecycle_stage != "deleted":
        return run
    experiment_id = run.info.experiment_id
    if client.get_experiment(experiment_id).lifecycle_stage == "deleted":
        raise ConfigError(
            f"run {run_id} was deleted in MLflow with its experiment; bring both back: "
            f"mlflow experiments restore --experiment-id {experiment_id}"
        )
    raise ConfigError(f"run {run_id} was deleted in MLflow; bring it back: mlflow runs restore --run-id {run_id}")


def check_free(client: Any, run: Any, *, may_have_ended: bool = False) -> None:
    """Raise ConfigError, which names every reason, unless a run that was made beforehand may be filled.

    Args:
        may_have_ended: the run that computed the results has ended, and ``mlflow run`` ends the run that it has made with it.
    """
    reasons = _reasons_against(client, run, may_have_ended and made_by_mlflow_run(run))
    if reasons:
        raise ConfigError(
            f"run {run.info.run_id} ({preview(run.info.run_name)}) cannot be taken over, because it {' and '.join(reasons)}: "
            "results of two runs would be mixed"
        )


def is_free(client: Any, run: Any) -> bool:
    """Return whether a run is running and has no results, neither this package's nor anybody's."""
    return not _reasons_against(client, run, may_have_ended=False)


def made_by_mlflow_run(run: Any) -> bool:
    """Return whether a run was made by ``mlflow run``, which logs its options as parameters and its source as tags."""
    return bool(run.data.tags.get("mlflow.source.type") == "PROJECT")


def _reasons_against(client: Any, run: Any, may_have_ended: bool) -> list[str]:
    reasons = []
    if run.info.status != "RUNNING" and not may_have_ended:
        reasons.append(f"is {run.info.status}")
    if ORIGIN in run.data.tags or any(name.startswith("phase2.") for name in run.data.params):
        reasons.append("is a run of cedkv already")
    if run.data.metrics:
        reasons.append(f"has {plural(len(run.data.metrics), 'metric')}")
    if not reasons and _has_artifacts(client, run.info.run_id):
        reasons.append("has artifacts")
    return reasons


def _has_artifacts(client: Any, run_id: str) -> bool:
    try:
        return bool(client.list_artifacts(run_id))
    except Exception:  # an artifact store that cannot be read is reported when files are logged; it keeps no metrics away
        return False


def _by_name(client: Any, name: str) -> Any:
    """Return the experiment of a name, which is created if there is none; another process may create it at the same time."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            client.create_experiment(name)
        except Exception as error:
            if _code(error) == "INVALID_PARAMETER_VALUE":
                raise ConfigError(f"MLflow rejects {preview(name)} as the name of an experiment: {error}") from None
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    return experiment


def _by_id(client: Any, experiment_id: str) -> Any:
    try:
        return client.get_experiment(experiment_id)
    except Exception as error:
        if _code(error) not in _NONE_THERE:
            raise
        raise ConfigError(
            f"MLFLOW_EXPERIMENT_ID = {preview(experiment_id)}: MLflow at {_store(client)} has no experiment with this id; "
            "unset it, or set MLFLOW_EXPERIMENT_NAME where a name is meant"
        ) from None


def _code(error: Exception) -> str:
    """Return the code of an error of MLflow; empty for any other error."""
    return str(getattr(error, "error_code", ""))


def _store(client: Any) -> str:
    """Return the tracking URI of a client without credentials."""
    return redact(str(client.tracking_uri))
