"""Fixtures of all tests: one torch thread, a tiny configuration, and one tiny prepared run of the digits."""

from __future__ import annotations

import copy
import io
import os
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

# threads of torch sleep while they wait for each other: processes of several tests share the cores, also those that tests start
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import Config
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import schema, to_table, write_meta, write_shards
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.models import forward_mode
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.storage import lock, object_store

ROOT = Path(__file__).resolve().parents[1]

LIMIT, CHAOS_LIMIT = 300, 900  # seconds of a phase of a test; `faulthandler_timeout` (pyproject.toml) is longer

# in float32, so that tests compare with exact values on every machine
TINY: dict[str, Any] = {
    "data": {"size": 8, "channels": 1, "holdout": 0.25, "chunk": 32, "classes": ["0", "1", "2"]},
    "score": {"trials": 2, "epochs": 2, "width": 8, "batch": 64, "precision": "fp32"},
    "select": {"keep": 0.2},
    "distill": {
        "steps": 3,
        "width": 8,
        "checkpoint_every": 2,
        "dm": {"augment": "color_crop_cutout_scale_rotate"},
        "precision": "fp32",
    },
    "evaluate": {"seeds": 2, "epochs": 3, "precision": "fp32"},
    "cluster": {"address": "none"},
}

PLAIN = "color_crop_cutout_scale_rotate"
EXPERTS = {"experts": 2, "expert_epochs": 3, "max_start": 1, "target_epochs": 1, "student_steps": 2, "image_lr": 10.0,
           "augment": PLAIN, "expert_augment": PLAIN}  # fmt: skip
TEACHER = {"teacher_network": "convnet_bn", "teacher_epochs": 2, "teacher_augment": PLAIN, "label_epochs": 2}
# settings with which a method is fast on three digits
SMALL: dict[str, dict[str, Any]] = {
    "dc": {"outer": 2, "inner": 2},
    "dsa": {"outer": 2, "inner": 2, "augment": PLAIN},
    "dm": {"augment": PLAIN},
    "idc": {"inner": 2, "network_samples": 32, "real_batch": 8},
    "mtt": EXPERTS,
    "tesla": EXPERTS,
    "sre2l": TEACHER,
    "rded": TEACHER,
}


def tiny_config(folder: Path | str, **overrides: Any) -> Config:
    """Three digits, small networks, few steps; keys of sections are joined by two underscores: distill__dc__outer=2."""
    values: dict[str, Any] = {section: _copied(keys) for section, keys in TINY.items()}
    values["run"] = {"dir": str(folder), "seed": 0}
    for name, value in overrides.items():
        *sections, key = name.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return configuration.validate(values)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


class Calls(TorchDispatchMode):
    """A context that counts the operators that torch calls, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def as_if_compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """`auto` compiles everything, and compiled code runs as it is. Returns a list of the batches that such code gets."""
    seen: list[torch.Tensor] = []

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda images, *others: (seen.append(images), function(images, *others))[1]

    monkeypatch.setattr(forward_mode, "STEP_SECONDS", -1e9)
    monkeypatch.setattr(torch, "compile", compiled)
    return seen


class FixedNetwork(NetworkSpec):
    """A specification whose networks all start from the same weights, for any seed."""

    def __init__(self, spec: NetworkSpec, seed: int = 0, at_once: int = 1000):
        super().__init__(spec.name, spec.shape, spec.classes, spec.width, spec.depth)
        object.__setattr__(self, "parts", at_once)
        object.__setattr__(self, "network", spec.build(seed))

    def build(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.network)

    def microbatch(self, device: torch.device) -> int:
        return self.parts


def write_prepared(
    folder: Path, pixels: np.ndarray, labels: np.ndarray, group: int = 4, chunk: int = 16
) -> PreparedDataset:
    """A prepared training split of uint8 pixels [n, C, H, W] and labels [n], which are sorted here; mean 0.5, std 0.25."""
    order = np.argsort(labels, kind="stable")
    pixels, labels = np.asarray(pixels)[order], np.asarray(labels)[order]
    ids = [f"{label:03d}/{place:06d}" for place, label in enumerate(labels.tolist())]
    shape = pixels.shape[1:]
    write_shards(folder / "train", [to_table(ids, labels, pixels)], schema(shape), group)
    counts = np.bincount(labels).tolist()
    meta = {"class_names": [f"c{i}" for i in range(len(counts))], "shape": list(shape), "counts": {"train": counts},
            "mean": [0.5] * shape[0], "std": [0.25] * shape[0], "chunk": chunk}  # fmt: skip
    write_meta(folder, meta, "synthetic")
    return PreparedDataset(folder)


class Run:
    """A pipeline in this process and its console output."""

    def __init__(self, config: Config):
        self.log = io.StringIO()
        self.config, self.dir = config, Path(config.run.dir)
        self.pipeline = Pipeline(config, LocalExecutor, Display(Console(file=self.log, width=200)))

    def stages(self, *stages: str) -> Run:
        self.pipeline.run(stages)
        return self

    @property
    def text(self) -> str:
        return self.log.getvalue()


def leave_group() -> None:
    """End the processes of a group together, skipping the interpreter's shutdown, when threads of gloo may still run.

    They sometimes abort it ("terminate called without an active exception") after all work is done.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on Ray run in one process, which has the session's Ray; all others run in parallel to them.

    Slow ones with the group "more ray" run in another process, on a Ray of its own. They take as long, together with the
    group "hosts", as all others on Ray.
    """
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()) and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with limited(item, "the set-up"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with limited(item, "the test"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with limited(item, "the clean-up"):
        return (yield)


@contextmanager
def limited(item: pytest.Item, phase: str, seconds: float | None = None) -> Iterator[None]:
    """Fail a phase of a test that waits without end. Where native code waits, faulthandler ends the process later."""
    limit = seconds or (CHAOS_LIMIT if item.get_closest_marker("chaos") else LIMIT)

    def late(number: int, frame: object) -> None:
        pytest.fail(f"{item.nodeid}: {phase} takes more than {limit:g} s; the traceback shows what it waits for")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    return tiny_config


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """make_run(folder, **overrides): a pipeline with the tiny configuration."""
    return lambda folder, **overrides: Run(tiny_config(folder, **overrides))


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished tiny run; tests only read it."""
    run = Run(tiny_config(tmp_path_factory.mktemp("digits") / "run"))
    return run.stages("ingest", "score", "select", "distill", "evaluate")


@pytest.fixture(scope="session")
def local_digests(digits_run: Run) -> dict[str, str]:
    """Digests of the artefacts of the tiny run."""
    from storage_cases import artefact_digests

    files = (path for path in digits_run.dir.rglob("*") if path.is_file())
    return artefact_digests({path.relative_to(digits_run.dir).as_posix(): path.read_bytes() for path in files})


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock does not settle and a failing object store is retried at once."""
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    monkeypatch.setattr(object_store, "FIRST_PAUSE", 0.0)


@pytest.fixture
def places(digits_run: Run, tmp_path: Path) -> DistillPaths:
    """Where a distillation of the tiny run reads, and a separate folder for its output."""
    return DistillPaths(
        digits_run.dir / "prepared", digits_run.dir / "manifest.parquet", tmp_path / "work", tmp_path / "metrics.jsonl"
    )


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two small experts of MTT; tests only read it."""
    from expert_cases import train_experts

    return train_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data next to the repository, on development machines only."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data of {folder} is not here (a fresh clone has none)")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small Ray for all tests that need it."""
    import ray

    from distill_at_scale.cluster.session import quieten

    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less to start for each distillation
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20,
        _system_config={"worker_niceness": 0},  # Ray's own is 15: tests that run meanwhile would stop its workers
    )  # fmt: skip
    quieten()
    yield
    ray.shutdown()


@dataclass(frozen=True)
class S3:
    """A real S3 server on this machine: a client to fill it, and URIs for buckets and prefixes in it."""

    client: Any
    address: str

    def __call__(self, path: str, **options: str) -> str:
        query = {"endpoint_override": self.address, "scheme": "http", "region": "us-east-1", **options}
        return f"s3://{path}?{urlencode(query)}"

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> None:
        self.client.create_bucket(Bucket=bucket)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.client.put_object(
                Bucket=bucket, Key=f"{prefix}{path.relative_to(folder).as_posix()}", Body=path.read_bytes()
            )


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """s3("bucket/prefix") is a URI; credentials come from the environment alone."""
    boto3, server_module = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield S3(boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1"), f"{host}:{port}")
        server.stop()


@pytest.fixture
def bucket(s3: S3) -> str:
    """The name of an empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.client.create_bucket(Bucket=name)
    return name
