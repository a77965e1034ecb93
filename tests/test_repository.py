"""The promises that README and house style make about the files themselves."""

import ast
import importlib
import re
from dataclasses import fields

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()


def names(lines):
    return {re.match(r"[A-Za-z0-9_.-]+", line).group().lower() for line in lines if line.strip()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    source = (ROOT / f"{script}.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            imported |= {module.split(".")[0] for module in modules}
    assert not imported & set(SCRIPTS), "a script imports another"
    # PEP 723: what it imports is what its header declares, and what requirements.txt installs (pillow by torchvision)
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source).group(1)
    header = "".join(line.removeprefix("#").strip() for line in block.splitlines())
    declared = names(re.findall(r'"([A-Za-z][^"]*)"', header.split("dependencies")[1]))
    installed = names((ROOT / "requirements.txt").read_text().splitlines()) | {"pillow"}
    assert declared <= installed
    packages = {"PIL": "pillow", "ale_py": "ale-py"}
    third_party = {"torch", "torchvision", "gymnasium", "numpy", "tyro", "tensorboard", "PIL", "ale_py"}
    assert {packages.get(module, module) for module in imported & third_party} <= declared
    assert all(len(line) <= 120 for line in source.splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    (body,) = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Args"]
    for flag, text in zip(body[::2], body[1::2]):
        assert isinstance(flag, ast.AnnAssign) and isinstance(text.value, ast.Constant) and text.value.value


def test_the_readme_names_only_flags_that_exist():
    known = {"--help", "--flags", "--peer"}  # the last two are those of tests/benchmark_rl.py
    for script in SCRIPTS:
        module = importlib.import_module(script)
        if hasattr(module, "Args"):
            flags = [field.name.replace("_", "-") for field in fields(module.Args)]
            known |= {f"--{flag}" for flag in flags} | {f"--no-{flag}" for flag in flags}
    text = README.replace("--save-model", "")  # CleanRL's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_the_readme_describes_every_script_and_file():
    for script in SCRIPTS:
        assert f"`{script}.py`" in README
    for path in re.findall(r"(?:\]\(|`)(results/[\w./]+)", README):
        assert (ROOT / path).is_file(), path


def test_ci_runs_the_readme_s_test_command():
    command = "pip install -r requirements.txt && python -m pytest"
    (line,) = [line for line in README.splitlines() if "python -m pytest" in line]
    assert line.strip() == command and "grep -m 1 -F 'python -m pytest' README.md" in (ROOT / ".ci/run").read_text()
