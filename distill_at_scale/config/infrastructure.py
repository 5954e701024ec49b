"""The sections `run`, `track` and `cluster`: where a run is kept and logged, and where its work runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from distill_at_scale.config.fields import Section, execution_key


class RunSection(Section):
    """The run folder and the seed."""

    dir: str = execution_key("runs/run", description="run folder: a path, or a URI such as s3://bucket/runs/x")
    seed: int = Field(0, ge=0, description="seed of every random draw of the run")
    scratch: str | None = execution_key(
        None,
        description="where each machine keeps its copy of a run.dir on an object store; null: the temporary folder",
    )
    retry_seconds: float = execution_key(300.0, ge=0, description="seconds to keep retrying a failing object store")
    reuse: str | None = execution_key(
        None,
        description="another run folder; stages with the same fingerprint are copied from it instead of recomputed",
    )
    redo: Literal["ingest", "score", "select", "distill", "evaluate", "report"] | None = execution_key(
        None,
        description="from this stage on, output that is damaged or of another configuration is moved to replaced/ and "
        "computed again; null: it is an error",
    )

    @field_validator("dir", "scratch")
    @classmethod
    def _writable_names(cls, value: str | None) -> str | None:
        if value is not None and ("\0" in value or value != value.encode(errors="ignore").decode()):
            raise ValueError("it holds a null character or bytes that are not UTF-8; name another folder")
        return value


class MlflowSection(Section):
    """MLflow."""

    tracking_uri: str | None = Field(None, description="server or store; null: MLFLOW_TRACKING_URI or MLflow's default")
    experiment: str = Field("distill_at_scale", description="experiment to log to")


class WandbSection(Section):
    """Weights & Biases."""

    project: str = Field("distill_at_scale", description="project to log to")
    entity: str | None = Field(None, description="user or team; null: the account's default")
    mode: Literal["online", "offline"] = Field("online", description="offline: write to disk only")


class TrackSection(Section):
    """Experiment trackers, in addition to TensorBoard; credentials come from the environment, never from here."""

    mlflow: MlflowSection | None = Field(None, description="log to MLflow; null: do not")
    wandb: WandbSection | None = Field(None, description="log to Weights & Biases; null: do not")


class ClusterSection(Section):
    """Where and how Ray runs the work."""

    address: str | None = Field(
        None,
        description="null: start Ray on this machine; none: no Ray, all in this process; else a cluster's HOST:PORT",
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs per worker, also a fraction; 0: CPUs only")
    grows: bool = Field(
        False, description="true: an autoscaler adds nodes, so wait for resources that the cluster lacks"
    )
    actors: int | None = Field(None, ge=1, description="actors of ingest and scoring; null: as many as fit")
    max_failures: int = Field(3, ge=0, description="how often lost work is repeated before the run fails")
    object_store_mb: int | None = Field(
        None, ge=80, description="MiB of Ray's object store; null: 20 % of memory, up to 2,048"
    )
    price: float | None = Field(None, gt=0, description="price of one worker machine per hour, for `plan`")
