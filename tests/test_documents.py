"""The documents are true to the code: links, paths, commands, options, keys and imports that they name exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import distill_at_scale
from distill_at_scale import cli
from distill_at_scale.config.keys import sections
from distill_at_scale.config.load import Config, load

ROOMS = sorted(
    path.parent.name for path in (ROOT / "distill_at_scale").glob("*/README.md") if not path.parent.is_symlink()
)
PAGES = [ROOT / "README.md", *(ROOT / "distill_at_scale" / room / "README.md" for room in ROOMS)]
PAGES += sorted(path for name in (".github", "configs", "jobs") for path in (ROOT / name).rglob("*.md"))
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".sh"))
FILES = [
    path.relative_to(ROOT).as_posix()
    for name in ("distill_at_scale", "jobs", "configs", "tests", ".github")
    for path in (ROOT / name).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
]
COMMANDS = set(cli.commands())
SECTIONS = "|".join(Config.model_fields)
OVERRIDE = re.compile(
    rf"(?<![\w.])(?:{SECTIONS})(?:\.[a-z_0-9]+)+=(?:'[^']*'|\"[^\"]*\"|[^\s`'\"|,;)]*(?:,[^\s`'\"|;)]+\])?)"
)
COMMAND = re.compile(r"distill-at-scale (\w+) (\S+)")
EXAMPLES = ("mine/", "mine.yaml", "configs/NAME.yaml")  # files that a reader writes


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    """A document's text; of a recipe its comments."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n".join(
        line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)
texts = pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=name_of)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@texts
def test_files_exist(page):
    """A file may be named from the root, from the page's folder or from any folder in between."""
    for name in re.findall(r"(?<![\w…])[\w./-]*\w\.(?:py|yaml|sh|j2)\b", text_of(page)):
        name = name.removeprefix("../").removeprefix("../")
        known = any(f"/{file}".endswith(f"/{name}") for file in FILES)
        assert known or name.startswith(EXAMPLES), name


@texts
def test_commands_and_configurations_exist(page):
    for command, config in COMMAND.findall(text_of(page)):
        assert command in COMMANDS, command
        if config.startswith("configs/") and "NAME" not in config:
            assert (ROOT / config.strip("`.,;:)")).is_file(), config


@texts
def test_overrides_are_accepted(page):
    for text in OVERRIDE.findall(text_of(page)):
        load(ROOT / "configs" / "digits.yaml", [text.replace("'", "").replace('"', "").rstrip(".:")])


@texts
def test_keys_exist(page):
    """Keys named without a value, such as `data.holdout`, and in the form of YAML, such as `data.holdout: 0.2`."""
    keys = {name for section in sections(Config) for name in (section.name, *(key.name for key in section.keys))}
    for key, value in re.findall(rf"`((?:{SECTIONS})(?:\.[a-z_0-9]+)+)(?:: ([^`]+))?`", text_of(page)):
        if Path(key).suffix in (".py", ".json", ".parquet", ".html"):  # a file
            continue
        assert key in keys, key
        if value:
            load(ROOT / "configs" / "digits.yaml", [f"{key}={value}"])


@texts
def test_whole_commands_are_accepted(page):
    """The overrides of one line together, on the configuration that the line names."""
    for line in text_of(page).replace("\\\n", " ").splitlines():
        command = re.search(r"(?:distill-at-scale \w+|jobs/\w+\.py) (configs/\w+\.yaml)([^`#(]*)", line)
        if command and command[1] not in EXAMPLES:
            words = shlex.split(command[2].split("&&")[0])
            load(ROOT / command[1], [word for word in words if "=" in word])


@pages
def test_options_of_scripts_exist(page):
    for script, rest in re.findall(r"python (jobs/[\w/]+\.py)([^`\n#]*)", page.read_text(encoding="utf-8")):
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert f'"{option}"' in source, f"{script} {option}"


@pages
def test_configurations_in_examples_are_accepted(page, tmp_path):
    for number, text in enumerate(blocks(page.read_text(encoding="utf-8"), "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        load(path)


@pages
def test_imports_of_examples_work(page):
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill_at_scale"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pages
def test_names_of_the_api_in_examples_exist(page):
    """Names of `import distill_at_scale as das`, in blocks and in running text."""
    for name in re.findall(r"(?<![\w.])das\.(\w+)", page.read_text(encoding="utf-8")):
        assert name in distill_at_scale.__all__, name


@pages
def test_modules_that_are_run_exist(page):
    for module in re.findall(r"python -m (distill_at_scale[\w.]*)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize(
    "folder", [page.parent for page in PAGES if page.parent.parent.name in ("distill_at_scale", "jobs")], ids=name_of
)
def test_a_folder_describes_its_files(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    names |= {f"{path.name}/" for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert not [name for name in sorted(names) if f"`{name}`" not in text]
