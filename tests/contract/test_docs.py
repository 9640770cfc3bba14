"""Every command that the documentation shows can be typed as it stands."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from itpn_core.models import build_backbone
from itpn_core.pretraining import teachers
from itpn_core.pretraining.tasks import build_task
from orchestrator.config.load import load
from orchestrator.config.tree import FinetuneConfig, PretrainConfig, SweepJobConfig
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.run import run_training

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
DEFAULT_RECIPES = {"pretrain.py": "first_run.yaml", "finetune.py": "finetune_first_run.yaml"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Preparations that need no check beyond their form.
PLAIN = ("source .venv/bin/activate", "export RAY_AUTH_MODE=token", "ray start --head")


def commands():
    """(page, command) of every line in the bash blocks, without comments, continued lines joined."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+#.*$", "", line).strip()
                if command and not command.startswith("#"):
                    yield page.relative_to(ROOT).as_posix(), command


COMMANDS = sorted(set(commands()))


def test_the_two_commands_are_in_the_readme():
    shown = [command for page, command in COMMANDS if page == "README.md"]
    assert {"make pretrain", "make test", "make ui"} <= set(shown)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value)
def test_command_exists(page, command):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if not words:
        return
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: {command}"
    elif words[:3] == ["ray", "job", "submit"]:
        tail = words[words.index("--") + 1 :]
        assert words[3:5] == ["--working-dir", "."]
        check_job(page, tail)
    elif words[0] == "python":
        check_job(page, words)
    else:
        assert command.startswith(PLAIN), f"{page}: no check for {command!r}"


def schema_of(recipe):
    """What a recipe configures, by its name."""
    kinds = {"finetune": FinetuneConfig, "sweep": SweepJobConfig}
    return kinds.get(recipe.name.split("_")[0], PretrainConfig)


def check_job(page, words):
    """A job that exists, with options it has and settings it accepts."""
    assert words[0] == "python"
    if words[1] == "-m":
        module = ROOT.joinpath(*words[2].split("."))
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), f"{page}: {words}"
        return
    script = ROOT / words[1]
    assert script.exists(), f"{page}: {words}"
    arguments = words[2:]
    if script.name in DEFAULT_RECIPES:
        default = f"jobs/recipes/{DEFAULT_RECIPES[script.name]}"
        recipe = ROOT / (arguments[arguments.index("--recipe") + 1] if "--recipe" in arguments else default)
        load(schema_of(recipe), recipe, [word for word in arguments if re.match(r"[a-z_.]+=", word)])
        return
    options = {word.split("=")[0] for word in arguments if word.startswith("--")}
    if options:
        shown = help_of(script)
        assert all(option in shown for option in options), f"{page}: {words}"


@functools.cache
def help_of(script):
    return subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipes_load_and_tell_what_they_are(recipe):
    load(schema_of(recipe), recipe, [])
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    for word in ("Follows:", "Command:", "Verified:"):
        assert any(word in line for line in head), f"{recipe.name}: its header lacks {word}"


def test_constraints_pin_what_was_tested():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"].startswith("2.14.1")
    assert pins["torchvision"].startswith("0.29.1")
    assert {"ray", "timm", "webdataset", "mlflow", "omegaconf"} <= pins.keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipes_build_on_the_meta_device(recipe, monkeypatch):
    """The whole objective, with a teacher of the recipe's shape: widths, grids and sizes fit together."""
    monkeypatch.setattr(teachers, "_create", lambda asked: timm.create_model(asked.model, pretrained=False))
    config = load(schema_of(recipe), recipe, [])
    with torch.device("meta"):
        pretrains = isinstance(config, PretrainConfig)
        model = build_task(config.model, config.objective) if pretrains else build_backbone(config.model)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipes_pass_print_config(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ITPN_HOME", str(tmp_path))
    schema = schema_of(recipe)
    assert run_job(schema, "", str(recipe), run_training, resolve, ["--print-config"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load(schema, again, []) == resolve(load(schema, recipe, []))
