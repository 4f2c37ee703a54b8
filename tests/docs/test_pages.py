"""The docs are correct: their files and commands run, and the keys, commands and code files that they name exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import ROOT, environment, result

from dist_train.config.fields import section_of, walk
from dist_train.config.load import load_config
from dist_train.config.schema import Config
from dist_train.main import COMMANDS
from dist_train.run.api import train
from dist_train.runtime.location import expand_name

PAGES = (
    "start",
    "from-notebook-to-cluster",
    "gallery",
    "your-own",
    "tasks",
    "coming-from",
    "batch-size",
    "limits",
    "sweeps",
    "clusters",
    "troubleshooting",
    "how-it-works",
    "checkpoints",
    "reproducibility",
    "performance",
    "seeing",
)
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in PAGES}
# A fenced block: its language, the rest of that line (a file name, or `run`), its text.
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    return [(name, text) for kind, name, text in BLOCK.findall(TEXTS[page]) if kind == language]


def shell(folder: Path, text: str) -> str:
    """Run a block of shell commands, with the programs of this Python first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment(PATH=path), text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def simple_commands(folder: Path, text: str) -> str:
    """Run a block of plain commands, one per line, without a shell, with this Python, and torchrun and dist-train as modules.

    `|| test $? = 1` behind one says its exit code.
    """
    out = ""
    for line in text.splitlines():
        words, _, code = line.partition(" || test $? = ")
        program, *arguments = shlex.split(words)
        modules = {"torchrun": ["-m", "torch.distributed.run"], "dist-train": ["-m", "dist_train.main"]}
        module = modules.get(program, [])
        assert module or program == "python", line
        command = [sys.executable, *module, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True, timeout=500)
        assert done.returncode == int(code or 0), f"{line}\n{done.stdout}\n{done.stderr}"
        out += done.stdout
    return out


def test_the_custom_components_run_as_shown(tmp_path: Path) -> None:
    for language in ("python", "yaml"):
        for name, text in blocks("your-own", language):
            assert name.endswith((".py", ".yaml")), f"a block without a file's name:\n{text}"
            (tmp_path / name).write_text(text)
    out = "".join(simple_commands(tmp_path, text) for name, text in blocks("your-own", "sh") if name == "run")
    one, two = (result(tmp_path / "runs" / name) for name in ("waves", "two"))
    assert one["metrics"]["test"]["accuracy"] > 0.9
    assert one["metrics"]["test"]["recall"] > 0.8
    assert two["world_size"] == 2
    assert two["metrics"]["val"]["loss"] == pytest.approx(one["metrics"]["val"]["loss"], rel=1e-3)
    assert re.search(r"label: (slow|fast) prediction: (slow|fast)", out)
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 201
    assert {"accuracy", "f1_slow", "f1_fast", "auroc", "ap"} < result(tmp_path / "runs/metrics")["metrics"][
        "val"
    ].keys()
    assert result(tmp_path / "runs/autoencoder")["metrics"]["val"]["mse"] < 0.5


def test_the_first_page_trains_a_new_project_as_shown(tmp_path: Path) -> None:
    out = "".join(simple_commands(tmp_path, text) for name, text in blocks("start", "sh") if name == "run")
    assert result(tmp_path / "runs/moons")["epoch"] == 40
    assert result(tmp_path / "runs/two")["world_size"] == 2
    assert "ready" in out
    config = tmp_path / "my_project/config.yaml"
    config.write_text(config.read_text().replace("hidden: 32", "width: 32"))
    command = [sys.executable, "-m", "dist_train.main", "--config", "my_project/config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (2, blocks("start", "text")[0][1].strip())


@pytest.mark.chaos
def test_the_container_of_the_kubernetes_job_resumes_a_stopped_run(tmp_path: Path) -> None:
    """Its script on one host: a saved run isn't done, a completed one is, and a wrong config ends the job."""
    _, job = yaml.safe_load_all(dict(blocks("clusters", "yaml"))["job.yaml"])
    (container,) = job["spec"]["template"]["spec"]["containers"]
    script = container["args"][0].replace("/opt/dist_train", str(ROOT)).replace("configs/", f"{ROOT}/configs/")
    script = script.replace("/runs", "runs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def start(text: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*container["command"], text], cwd=tmp_path, env=environment(PATH=path, NNODES="1"))

    process = start(script)
    rows = tmp_path / "runs/digits/metrics.jsonl"
    while not rows.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 1
    assert json.loads((tmp_path / "runs/digits/status.json").read_text())["state"] == "preempted"
    assert start(script).wait() == 0
    assert result(tmp_path / "runs/digits")["state"] == "completed"
    assert start(script.replace("run.dir=runs", "trainer.epochs=3")).wait() == 2
    read = set(re.findall(r"\$\{?(\w+)", (ROOT / "launch/torchrun.sh").read_text()))
    assert {variable["name"] for variable in container["env"]} <= read


@pytest.mark.parametrize("page", ["from-notebook-to-cluster", "your-own"])
def test_the_chinese_page_has_the_same_files_and_commands(page: str) -> None:
    text = (ROOT / f"docs/zh/{page}.md").read_text()
    assert BLOCK.findall(text) == BLOCK.findall(TEXTS[page])


def test_messages_that_the_chinese_page_quotes_are_those_of_the_english_one() -> None:
    """In the first column of its tables, but for config errors: those are in the corpus of tests/config."""
    text = (ROOT / "docs/zh/troubleshooting.md").read_text().partition("\n## 第一步之前卡住\n")[2]
    cells = re.findall(r"^\| (`.*?`) \|", text, re.M)
    parts = [
        part for cell in cells for said in re.findall(r"`([^`]*)`", cell) for part in re.split(r" ?\.\.\. ?", said)
    ]
    assert len(parts) > 20
    assert [part for part in parts if part not in TEXTS["troubleshooting"]] == []


def test_the_comparison_of_runs_prints_what_is_shown(tmp_path: Path) -> None:
    out = "".join(simple_commands(tmp_path, text) for name, text in blocks("reproducibility", "sh") if name == "run")
    for _, text in blocks("reproducibility", "text"):
        shown = text.replace("SHA256", result(tmp_path / "runs" / "one")["weights_sha256"])
        assert shown in out, out


OTHERS = ("my_text.", "my_images.", "my_pairs.", "transformers.", "runs/digits")  # of a reader, or large


def test_the_tasks_train_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for language in ("python", "yaml"):
        for name, text in blocks("tasks", language):
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    trained = {}
    for name, text in blocks("tasks", "yaml"):
        assert load_config(tmp_path / name).data.global_batch_size
        if not any(other in text for other in OTHERS) and name != "detection.yaml":
            trained[name] = train(name, "tracking.report=false", "tracking.tensorboard=false")["metrics"]
    assert sorted(trained) == ["gan.yaml", "lbfgs.yaml", "muon.yaml", "sam.yaml", "two_classes.yaml", "vae.yaml"]
    assert trained["two_classes.yaml"]["val"]["accuracy"] > 0.9
    assert {"loss/a", "loss/b"} <= trained["two_classes.yaml"]["val"].keys()
    assert trained["sam.yaml"]["val"]["accuracy"] > 0.8
    first, *_, last = [json.loads(line)["loss"] for line in Path("runs/lbfgs/metrics.jsonl").read_text().splitlines()]
    assert last < 0.1 < first


@pytest.mark.chaos
def test_the_sweep_runs_as_shown(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    out = "".join(shell(tmp_path, text) for name, text in blocks("sweeps", "sh") if name == "run")
    for name in ("lr0.03-seed0", "lr0.03-seed1", "lr0.3-seed0", "lr0.3-seed1"):
        assert result(tmp_path / "runs/sweep" / name)["state"] == "completed"
        assert name in out
    assert "optimizer.lr" in out
    assert (tmp_path / "comparison.html").stat().st_size > 10_000


def test_the_wandb_sweep_makes_valid_commands() -> None:
    """With wandb's own code, the way its agent builds them."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(dict(blocks("sweeps", "yaml"))["sweep.yaml"])
    chosen = {"args": {"optimizer.lr": {"value": 0.0123}, "seed": {"value": 2}}}
    assert list(chosen["args"]) == list(sweep["parameters"])
    *command, last = create_sweep_command(sweep["command"])
    assert (command[:5], last) == (["python", "-m", "dist_train.main", "--config", command[4]], "${args_no_hyphens}")
    overrides = [*command[5:], *create_sweep_command_args(chosen)["args_no_hyphens"]]
    config = load_config(ROOT / command[4], overrides)
    assert (config.get("optimizer.lr"), config.seed) == (0.0123, 2)
    assert expand_name(config.run.name or "", config, time="", job="") == "sweep/lr0.0123-seed2"
    assert config.tracking.wandb is not None


@pytest.mark.parametrize("page", [page for page in PAGES if page != "your-own"])
def test_config_fragments_are_valid(page: str, tmp_path: Path) -> None:
    for k, text in enumerate(text for name, text in blocks(page, "yaml") if not name):
        path = tmp_path / f"{k}.yaml"
        path.write_text(f"extends: {ROOT}/configs/digits.yaml\n{text}")
        assert isinstance(load_config(path), Config)  # raises an error if the page is wrong


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_commands_exist(page: str) -> None:
    known = dict(walk(Config))
    sections = "|".join(name for name in Config.model_fields if section_of(Config.model_fields[name]))
    text = re.sub(r"^```python.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    for key in re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_.]*[a-z_])(?![\w(/])", text):
        assert any(key == leaf or key.startswith(leaf + ".") for leaf in known) or key.endswith(".py"), key
    for word in re.findall(r"(?:dist_train\.main|dist-train) ([a-z]\w*)(?![\w.]*[=./])", text):
        assert word in COMMANDS, word
    assert TEXTS[page].isascii()


@pytest.mark.parametrize("page", PAGES)
def test_code_files_exist(page: str) -> None:
    """Files of this repository, or of the package, that a page names in backticks: `reduction/reduce.py`."""
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|sh|sbatch|yaml|md))?)`", TEXTS[page]):
        if name.split("/")[0] in ("data", "checkpoints", "logs", "runs"):  # of a run, or of a user
            assert not name.endswith(".py") or (ROOT / "dist_train" / name).exists(), name
        else:
            assert (ROOT / name).exists() or (ROOT / "dist_train" / name).exists(), name
