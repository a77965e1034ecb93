"""The commands of README and pages: those of games are executed, in order and small; all flags are understood."""

import glob
import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT, run

SMALL = "--total-timesteps 30 --learning-starts 20 --eval-frequency 10 --eval-episodes 1 --num-envs 2 --narrow 8"
SMALL += " --buffer-size 100"


def commands(page):
    """(script, arguments) of the lines of code, and of the code in the text, that run a script."""
    text = re.sub(r" *\\\n +", " ", page.read_text())
    lines = re.findall(r"^ {4,}python (\S+\.py)(.*)$", text, re.M) + re.findall(r"`python (\w+\.py)([^`]*)`", text)
    return [(script, shlex.split(re.sub(r"[>#;|].*", "", rest).replace("\n", " "))) for script, rest in lines]


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("results/**/*.md"))]
FOUND = sorted({(script, *arguments) for page in PAGES for script, arguments in commands(page)})


@pytest.mark.parametrize("command", [c for c in FOUND if (ROOT / c[0]).parent == ROOT and c[0] != "catch_env.py"])
def test_flags_of_the_commands_of_readme_and_pages_are_understood(command):
    script, *arguments = [word.replace("$seed", "1").replace("$stage", "hybrid") for word in command]
    tyro.cli(importlib.import_module(script[: -len(".py")]).Args, args=arguments)


def test_readme_s_commands_for_games_run_in_order(tmp_path):
    (tmp_path / "results/catch").mkdir(parents=True)
    (tmp_path / "results/catch/curves.csv").symlink_to(ROOT / "results/catch/curves.csv")
    printed = {}
    for script, arguments in commands(ROOT / "README.md"):
        arguments = [found for word in arguments for found in (glob.glob(str(tmp_path / word)) or [word])]
        if script.endswith("_atari.py"):
            arguments += SMALL.split()
        elif script == "transfer_matrix.py" and arguments[0] == "plan":
            arguments = [word for word in arguments if word not in ("2", "3")] + [f"--args={SMALL}"]
        elif script.startswith(("finetune", "lottery", "catch")):
            continue  # their data cannot be had here; their own tests run them on other data
        for stage in ("source", "transfer", "self-transfer") if "$stage" in arguments else ("",):
            words = [word.replace("$stage", stage) for word in arguments]
            printed[script, words[0]] = out = run(script, *words, cwd=tmp_path).stdout
            for _, job, *flags in map(shlex.split, out.splitlines() if stage else ()):  # what xargs would run
                run(job, *flags, cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/*/*.pt"))) == 5 and len(list(tmp_path.glob("study/*/*.pt"))) == 3 + 6 + 6
    assert "Catch-v3" in printed["transfer_matrix.py", "table"]
    assert len(list(tmp_path.glob("pictures/*.png"))) >= 5 and list(tmp_path.glob("results/*.png"))


TRAINED = [c for page in PAGES[1:] for c in commands(page) if c[0].endswith("_atari.py") and "--evaluate" not in c[1]]


@pytest.mark.parametrize("script, arguments", TRAINED)
def test_the_pages_commands_for_games_run(script, arguments, tmp_path):
    (tmp_path / "results").symlink_to(ROOT / "results")
    arguments = [word.replace("$seed", "1") for word in arguments]
    small = SMALL.replace("--narrow 8", "").replace("--eval-frequency 10", "--eval-frequency 0")
    run(script, *arguments, *small.split(), cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/*/*.pt"))) == 1
