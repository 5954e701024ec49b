"""Rules of the layout, checked on the source: imports go down only, one room imports Ray, only the command prints."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY

PACKAGE = ROOT / "distill_at_scale"
ROOMS = [  # from the ground up: a module imports from its own room and from the rooms before it
    "core",
    "config",
    "models",
    "storage",
    "data",
    "pruning",
    "distillation",
    "pipeline",
    "experiments",
    "cluster",
    "cli_work",
    "cli",
    "__main__",
    "jobs",
]


def modules() -> dict[str, Path]:
    paths = {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = modules()


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions; `from x import y` is x.y if that is a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & set(MODULES)
            if inner - names:
                names.add(str(node.module))
    return names


def layer(module: str) -> int:
    parts = module.split(".")
    head = parts[0] if parts[0] == "jobs" else parts[1]
    return ROOMS.index(head)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(MODULES[module]) if name in MODULES and name not in ("distill_at_scale", module)}


def test_the_package_root_holds_only_the_expected_folders():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert names == {"__init__.py", "__main__.py", "cli.py", "cli_work.py", "configs", "py.typed", *ROOMS[:10]}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m != "distill_at_scale"))
def test_imports_go_down_only(module):
    assert {name for name in own_imports(module) if layer(name) > layer(module)} == set()


def test_rooms_import_only_the_version_from_the_package_root():
    for module, path in MODULES.items():
        if module.startswith(("jobs", "distill_at_scale.cli")):  # they call the API
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert "distill_at_scale" not in {alias.name for alias in node.names}, module
            elif isinstance(node, ast.ImportFrom) and node.module == "distill_at_scale":
                names = {alias.name for alias in node.names if alias.name not in ROOMS}
                assert names <= {"__version__"}, f"{module} imports {names} from the package root"


def test_there_are_no_import_cycles():
    waiting = {module: own_imports(module) for module in MODULES}
    while free := [module for module, needs in waiting.items() if not needs & set(waiting)]:
        for module in free:
            del waiting[module]
    assert waiting == {}


def test_only_the_cluster_folder_imports_ray():
    users = {m for m, path in MODULES.items() if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert users
    assert {m for m in users if not m.startswith(("distill_at_scale.cluster", "jobs"))} == set()


def test_core_modules_do_not_import_the_cluster():
    above = ("jobs", *(f"distill_at_scale.{name}" for name in ("cluster", "cli", "pipeline.pipeline")))
    for module in MODULES:
        if not module.startswith(above) and module != "distill_at_scale":
            assert not any(name.startswith("distill_at_scale.cluster") for name in own_imports(module)), module


def test_core_modules_never_print():
    for module, path in MODULES.items():
        if module.startswith("jobs") or module in ("distill_at_scale.cli", "distill_at_scale.core.progress"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path}:{node.lineno} prints"


def test_core_modules_read_no_environment():
    for module, path in MODULES.items():
        if (
            module.startswith(("jobs", "distill_at_scale.cluster", "distill_at_scale.cli"))
            or module == "distill_at_scale"
        ):
            continue
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
        }
        assert not names & {"environ", "getenv"}, module


def test_every_module_has_a_docstring():
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path


def test_init_files_are_empty_except_tables_and_the_api():
    allowed = {"", "distillation.methods", "data.sources", "pruning.criteria", "experiments.studies"}  # "": the API
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module.startswith("distill_at_scale"):
            assert module.partition(".")[2] in allowed or path.read_text(encoding="utf-8") == "", module


# installed by an extra or only on some platforms, or (torchvision) slow to import and used only by some networks
OPTIONAL = ("mlflow", "wandb", "boto3", "botocore", "moto", "decord", "tensorboard", "sqlalchemy", "torchvision")
CLUSTER = sorted(m for m in MODULES if m.startswith("distill_at_scale.cluster"))
TRANSFORM = (
    "distill_at_scale.distillation.prepared_transform"  # a transform of torchvision, imported when it is asked for
)
CORE = sorted(m for m in MODULES if m.startswith("distill_at_scale") and m not in (*CLUSTER, TRANSFORM))
IMPORT_BLOCKED = """
import importlib, sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
for name in {modules!r}:
    importlib.import_module(name)
"""
RUN = """
from distill_at_scale.cli import main
sys.exit(main(["run", {config!r}]))
"""


def test_the_core_works_without_ray_and_optional_packages(tmp_path):
    """Every core module imports, and the whole command runs a tiny configuration."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "run": {"dir": str(tmp_path / "run")}}), encoding="utf-8")
    code = (IMPORT_BLOCKED + RUN).format(blocked=("ray", *OPTIONAL), modules=CORE, config=str(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert "distilled" in done.stdout


def test_cluster_modules_import_without_optional_packages():
    code = IMPORT_BLOCKED.format(blocked=OPTIONAL, modules=CLUSTER)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def texts_without_encoding(tree: ast.AST) -> list[int]:
    """Lines of calls that read or write text in the encoding of the locale."""

    def mode(call: ast.Call, position: int) -> str:
        named = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
        value = [*call.args[position : position + 1], *named, ast.Constant("r")][0]
        return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else "b"

    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        is_function = isinstance(call.func, ast.Name)
        text = (
            (name == "read_text" and not call.args)
            or (name == "write_text" and len(call.args) < 2)
            or (name in ("open", "fdopen") and (is_function or name == "fdopen") and "b" not in mode(call, 1))
            or (name == "open" and not is_function and bool(call.args) and set(mode(call, 0)) <= set("rwax+t"))
            or (name in ("NamedTemporaryFile", "TemporaryFile") and set(mode(call, 0)) & set("wax") != set()
                and "b" not in mode(call, 0))
        )  # fmt: skip
        if text and not {"encoding", None} & {keyword.arg for keyword in call.keywords}:
            lines.append(call.lineno)
    return lines


def test_text_files_are_read_and_written_as_utf_8():
    """Else a locale such as GBK or KOI8-R decides."""
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for folder in (PACKAGE, ROOT / "jobs", ROOT / "tests")
        for path in folder.rglob("*.py")
        for line in texts_without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("path.read_text()", 1), ("path.read_text('utf-8')", 0), ("path.read_text(encoding='utf-8')", 0),
        ("path.write_text(x)", 1), ("open(p)", 1),
        ("open(p, 'w')", 1), ("open(p, 'rb')", 0), ("open(p, mode='wb')", 0), ("path.open('w')", 1), ("path.open('rb')", 0),
        ("store.open(file)", 0), ("Image.open(p)", 0), ("os.fdopen(n, 'w')", 1), ("NamedTemporaryFile('w')", 1),
        ("NamedTemporaryFile()", 0), ("open(p, 'a', encoding='utf-8')", 0),
    ],
)  # fmt: skip
def test_the_rule_on_encodings_sees_each_way_to_open_a_text(code, count):
    assert len(texts_without_encoding(ast.parse(code))) == count
