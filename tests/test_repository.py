"""The promises that README and house style make about the files themselves."""

import ast
import importlib
import re
from dataclasses import fields

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("results/**/*.md"))]


def names(lines):
    return {re.match(r"[A-Za-z0-9_.-]+", line).group().lower() for line in lines if line.strip() and line[0] != "#"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    source = (ROOT / f"{script}.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            imported |= {module.split(".")[0] for module in modules}
    assert not imported & set(SCRIPTS), "a script imports another"
    # PEP 723: what it imports is what its header declares, and what requirements.txt installs
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source).group(1)
    header = "".join(line.removeprefix("#").strip() for line in block.splitlines())
    declared = names(re.findall(r'"([A-Za-z][^"]*)"', header.split("dependencies")[1]))
    installed = names((ROOT / "requirements.txt").read_text().splitlines())
    assert declared <= installed
    packages = {"PIL": "pillow", "ale_py": "ale-py"}
    third_party = set("torch torchvision gymnasium numpy tyro tensorboard PIL ale_py matplotlib pycocotools".split())
    assert {packages.get(module, module) for module in imported & third_party} <= declared
    assert all(len(line) <= 120 for line in source.splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Args"]
    assert bodies
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    for body in bodies:  # in an end-of-line comment or in a string below
        for flag, below in zip(body, [*body[1:], None]):
            if isinstance(flag, ast.AnnAssign):
                assert isinstance(below, ast.Expr) or re.search(r"  # \S", lines[flag.end_lineno - 1]), flag.target.id


ATARI = ["ddqn_atari", "dqv_atari", "dqv_max_atari"]
THE_ALGORITHM = {
    "header", "ARCHITECTURES", "Args.double", "Args.dueling", "Args.architecture",
    "Args.learning_rate", "Args.v_learning_rate", "Args.v_optimizer",
    "Args.start_e", "ALGORITHM", "LOSSES", "QNetwork", "make_networks", "learn",
    "main: ALGO LOGIC: networks", "main: ALGO LOGIC: target network and optimizers",
    "main: ALGO LOGIC: training, on the device", "main: ALGO LOGIC: update target network",
}  # fmt: skip


def blocks(script):
    """{name: text} of all that a script consists of, comments included, in order."""
    source = (ROOT / f"{script}.py").read_text()
    lines, parts, end = source.splitlines(), {}, source.splitlines().index("# /// script")
    parts["header"] = lines[:end]
    for node in ast.parse(source).body:
        start, end = end, node.end_lineno
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            parts["imports"] = parts.get("imports", []) + lines[start:end]
        elif isinstance(node, ast.ClassDef) and node.name == "Args":
            for flag in node.body:
                parts[f"Args.{flag.target.id}"] = lines[start : flag.end_lineno]
                start = flag.end_lineno
        elif isinstance(node, ast.If):
            name = "main: start"
            for line in lines[start:end]:
                name = f"main: {line.strip('# ')}" if re.match(r" +# (TRY NOT|ALGO LOGIC)", line) else name
                parts[name] = parts.get(name, []) + [line]
        else:
            name = node.name if hasattr(node, "name") else getattr(node, "targets", [getattr(node, "target", 0)])[0].id
            parts[name] = parts.get(name, []) + lines[start:end]
    assert end == len(lines) and sum(map(len, parts.values())) == len(lines)
    return {name: "\n".join(text) for name, text in parts.items()}


@pytest.mark.parametrize("script", ATARI[1:])
def test_the_atari_scripts_differ_in_the_algorithm_only(script):
    one, other = blocks(ATARI[0]), blocks(script)
    names = [name for name in [*one, *other] if name not in THE_ALGORITHM]
    drifted = {name for name in names if one.get(name) != other.get(name)}
    assert not drifted, f"{', '.join(sorted(drifted))}: not the same in {ATARI[0]}.py and {script}.py"
    assert [name for name in one if name in names] == [name for name in other if name in names], "in another order"
    assert len(set(names)) > 60


def test_the_drift_test_names_the_block_that_drifted(monkeypatch, tmp_path):
    for script in ATARI:
        text = (ROOT / f"{script}.py").read_text()
        if script == "dqv_atari":
            text = text.replace("np.minimum(self.age + 1, 3)", "np.minimum(self.age + 1, 2)", 1)
        (tmp_path / f"{script}.py").write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    test_the_atari_scripts_differ_in_the_algorithm_only("dqv_max_atari")
    with pytest.raises(AssertionError, match="^Replay: not the same in ddqn_atari.py and dqv_atari.py"):
        test_the_atari_scripts_differ_in_the_algorithm_only("dqv_atari")


def test_readme_and_pages_name_only_flags_that_exist():
    words = "help flags peers peer-pythons cleanrl updates rounds processes steps images source-size archs workers"
    words += " array gres wrap line-length select index-url"  # of the benchmarks; of Slurm, ruff, pip
    known = {f"--{word}" for word in words.split()}
    modules = [importlib.import_module(script) for script in SCRIPTS]
    for args in [module.Args for module in modules if hasattr(module, "Args")]:
        flags = [field.name.replace("_", "-") for field in fields(args)]
        known |= {f"--{flag}" for flag in flags} | {f"--no-{flag}" for flag in flags}
    for page in PAGES:
        text = page.read_text().replace("--save-model", "")  # CleanRL's
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - known == set(), page


def test_readme_and_pages_describe_every_script_and_link_to_what_is_there():
    assert len(README.splitlines()) <= 220 and all(f"`{script}.py`" in README for script in SCRIPTS)
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / link).exists(), (page, link)
        for path in re.findall(r"`(results/[\w./-]+)", text):
            assert (ROOT / path).exists(), (page, path)
