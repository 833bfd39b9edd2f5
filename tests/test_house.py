"""What holds the house together: import direction, the tree in README, shipped sizes."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["configs", "data", "training", "evaluation", "launch"]  # each imports only what is left of it
MEGABYTE = 10**6


def tracked(pattern: str = "*") -> list[Path]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return modules | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    later = LAYERS[LAYERS.index(layer) + 1 :]
    for path in (ROOT / layer).rglob("*.py"):
        wrong = {module for module in imported(path) if module.split(".")[0] in later}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_engine_imports_nothing_of_ours_but_the_config_loader() -> None:
    for path in (ROOT / "evaluation" / "engine").glob("*.py"):
        ours = {module for module in imported(path) if module.split(".")[0] in LAYERS}
        wrong = {m for m in ours if m != "configs.load" and not m.startswith("evaluation.engine")}
        assert not wrong, f"{path.name} imports {wrong}"


def test_tree_in_readme_is_what_is_on_disk() -> None:
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- tree -->")[1]
    named, folder = set(), ""
    for line in re.findall(r"(?m)^( *)(\S+)(?: {2,}\S.*)?$", block.strip().strip("`")):
        indent, name = line
        if not indent:
            folder = name if name.endswith("/") else ""
            named.add(folder or name)
        else:
            named.add(folder + name)
    python = {str(p.relative_to(ROOT)) for p in tracked("*.py") if p.name != "__init__.py" and "tests" not in p.parts}
    missing = python - named
    assert not missing, f"README's tree lacks {sorted(missing)}"
    gone = {name for name in named if not (ROOT / name).exists()}
    assert not gone, f"README's tree names what is not there: {sorted(gone)}"


def test_what_ships_is_small_enough() -> None:
    shipped = sum(path.stat().st_size for path in (ROOT / "data" / "embedded").rglob("*") if path.is_file())
    assert shipped <= 24 * MEGABYTE
    model = sum(path.stat().st_size for path in (ROOT / "data" / "embedded" / "model").glob("*.safetensors"))
    assert 0 < model <= 16 * MEGABYTE


def test_no_machine_paths_in_the_project() -> None:
    for path in tracked():
        if path.suffix in {".py", ".md", ".yaml", ".toml", ""} and path.name != Path(__file__).name and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/work/|/root/", text), f"{path.relative_to(ROOT)} names a machine's path"
