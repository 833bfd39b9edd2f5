"""What holds the house together: which room imports which, the trees in the READMEs, shipped sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
MEGABYTE = 10**6
ENGINE = "evaluation.engine"
EVERYTHING = ("configs", "data", "training", "evaluation", "launch")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "configs": (),
    "data": ("configs",),
    "training": ("configs", "data", "training.model"),
    "training.model": ("configs",),
    "evaluation": ("configs", "data", "training", ENGINE, "evaluation.quality", "evaluation.frontier.result"),
    "evaluation.quality": ("configs", "training", ENGINE, "evaluation.results"),
    f"{ENGINE}.cache": ("configs",),
    f"{ENGINE}.store": (
        "configs", "training.model.shards", "training.model.expert_format", "training.model.expert_layout",
        "training.model.host_memory",
    ),
    f"{ENGINE}.memory": ("configs", f"{ENGINE}.cache", f"{ENGINE}.store", "training.model.host_memory"),
    ENGINE: ("configs", f"{ENGINE}.cache", f"{ENGINE}.store", f"{ENGINE}.memory", "training.model"),
    f"{ENGINE}.sessions": ("configs", ENGINE, "training.model"),
    "evaluation.frontier.result": ("configs", "evaluation.results"),
    "evaluation.report": ("configs", "evaluation.results", "evaluation.turns", "evaluation.frontier.result"),
    "evaluation.server": ("configs", ENGINE, "training.model"),
    "evaluation.export": ("configs", f"{ENGINE}.store", "training"),
    "evaluation.benchmark": (
        "configs", "data", "training", ENGINE, "evaluation.report", "evaluation.export", "evaluation.machine",
        "evaluation.quality", "evaluation.tracing", "evaluation.turns",
    ),
    "launch": EVERYTHING,
}  # fmt: skip
"""Room -> what it may import of ours beside itself; the longest name that fits decides, on both sides of the arrow."""
WITHOUT_TORCH = (f"{ENGINE}.cache", f"{ENGINE}.store")
INTERNALS = "training.model.transformers_internals"
UNSTABLE = (
    "transformers.conversion_mapping", "transformers.core_model_loading", "transformers.integrations",
    "transformers.masking_utils", "transformers.modeling_layers", "transformers.modeling_utils",
)  # fmt: skip
"""Modules of transformers that promise nothing from one release to the next."""
PARSERS = ("launch", "training.train", "configs.command")
"""Where command lines are read."""


def tracked(pattern: str = "*") -> list[Path]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def product() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module that is no test."""
    for path in tracked("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.startswith("tests"):
            yield name, path


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return modules | {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(name: str) -> str:
    return max((room for room in MAY_IMPORT if inside(name, room)), key=len)


def allowed(name: str, module: str) -> bool:
    """Whether the module `name` may import `module` of ours."""
    room = room_of(name)
    return room == room_of(module) or any(inside(module, named) for named in MAY_IMPORT[room])


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    for name, path in product():
        ours = {module for module in imported(path) if module.split(".")[0] in EVERYTHING}
        wrong = {module for module in ours if room_of(name) == room and not allowed(name, module)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_cache_and_the_store_need_neither_torch_nor_transformers() -> None:
    for name, path in product():
        if any(inside(name, room) for room in WITHOUT_TORCH):
            heavy = {module for module in imported(path) if module.split(".")[0] in ("torch", "transformers")}
            assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)}"


def test_one_file_alone_knows_the_inside_of_transformers() -> None:
    for name, path in product():
        inner = {
            module
            for module in imported(path)
            if any(inside(module, unstable) for unstable in UNSTABLE)
            or (module.startswith("transformers.") and "._" in module)
        }
        assert not inner or name == INTERNALS, f"{path.relative_to(ROOT)} imports {sorted(inner)}"
    attributes = re.compile(r"\b(_can_record_outputs|_is_expert_parallel)\b")
    knowing = {name for name, path in product() if attributes.search(path.read_text(encoding="utf-8"))}
    assert knowing == {INTERNALS}


def test_command_lines_are_read_in_launch_alone() -> None:
    for name, path in product():
        if not any(inside(name, room) for room in PARSERS):
            parsers = {module for module in imported(path) if module.split(".")[0] in ("argparse", "tyro")}
            assert not parsers, f"{path.relative_to(ROOT)} imports {sorted(parsers)}"


def trees() -> dict[Path, set[str]]:
    """Folder -> the files that the tree in its README names, as paths from the root."""
    found = {}
    for readme in tracked("*README.md"):
        parts = readme.read_text(encoding="utf-8").split("<!-- tree -->")
        if len(parts) < 3:
            continue
        named, folder = set(), ""
        for indent, name in re.findall(r"(?m)^( *)(\S+)(?: {2,}\S.*)?$", parts[1].strip().strip("`")):
            if not indent:
                folder = name if name.endswith("/") else ""
            named.add(str((readme.parent / (folder + name if indent else name)).relative_to(ROOT)))
        found[readme.parent] = named
    return found


def test_every_file_is_in_the_tree_of_the_nearest_readme() -> None:
    named = trees()
    for name, path in product():
        if path.name != "__init__.py":
            folder = next(parent for parent in path.parents if parent in named)
            assert str(path.relative_to(ROOT)) in named[folder], f"{folder.name}/README.md lacks {name}"


def test_trees_name_nothing_that_is_not_there() -> None:
    for folder, named in trees().items():
        gone = sorted(name for name in named if not (ROOT / name).exists())
        assert not gone, f"{folder.name}/README.md names {gone}"


def test_every_direct_import_is_declared_with_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for listed in project["optional-dependencies"].values() for requirement in listed]
    declared = {Requirement(text).name.lower().replace("_", "-"): Requirement(text) for text in extras}
    declared |= {
        Requirement(text).name.lower().replace("_", "-"): Requirement(text) for text in project["dependencies"]
    }
    providers = packages_distributions()
    for name, path in product():
        for module in {module.split(".")[0] for module in imported(path)} - set(EVERYTHING) - sys.stdlib_module_names:
            names = {provider.lower().replace("_", "-") for provider in providers.get(module, [module])}
            assert names & declared.keys(), f"{name} imports {module}, which pyproject.toml does not declare"
            wanted = declared[min(names & declared.keys())].specifier
            assert any(part.operator in ("<", "==") for part in wanted), f"{module} has no upper bound"


def test_what_ships_is_small_enough() -> None:
    shipped = sum(path.stat().st_size for path in (ROOT / "data" / "embedded").rglob("*") if path.is_file())
    assert shipped <= 34 * MEGABYTE
    for model in ("model", "fine_grained"):
        weights = sum(path.stat().st_size for path in (ROOT / "data" / "embedded" / model).glob("*.safetensors"))
        assert 0 < weights <= 16 * MEGABYTE


def test_no_machine_paths_in_the_project() -> None:
    for path in tracked():
        if path.suffix in {".py", ".md", ".yaml", ".toml", ""} and path.name != Path(__file__).name and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/work/|/root/", text), f"{path.relative_to(ROOT)} names a machine's path"
