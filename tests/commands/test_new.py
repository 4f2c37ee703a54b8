"""A new project, made by the wheel that people install, trains as it is."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment, result

from dist_train.main import main

FILES = ["config.yaml", "data.py", "dist_train.schema.json", "model.py", "train.sbatch"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel of this tree installs, in a directory of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dist_train", tree / "dist_train", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    site = folder / "site"
    subprocess.run([*pip, "--target", str(site), str(tree)], check=True, env=environment())
    shutil.rmtree(tree)
    return site


@pytest.fixture(scope="module")
def project(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project, trained by what is installed."""
    folder = tmp_path_factory.mktemp("new")
    program = Path(__file__).parent / "programs" / "new_project.py"
    command = [sys.executable, str(program), str(installed)]
    env = environment(PYTHONPATH=str(installed))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "project"


def test_a_new_project_trains_from_the_installed_wheel(project: Path) -> None:
    run = project / "runs" / "moons"
    assert result(run)["state"] == "completed"
    assert result(run)["metrics"]["test"]["accuracy"] > 0.85
    assert "dist_train" not in {path.name for path in project.iterdir()}


def test_its_boundary_is_shown_as_it_moved(project: Path) -> None:
    run = project / "runs" / "moons"
    steps = [f"{12 * epoch:08d}" for epoch in range(1, 7)]
    assert sorted(path.name for path in (run / "boundary").glob("*.npz")) == [f"step-{step}.npz" for step in steps]
    assert sorted(path.name for path in (run / "boundary").glob("*.png")) == [f"boundary-{step}.png" for step in steps]
    assert (run / "boundary" / "boundary.gif").read_bytes()[:6] == b"GIF89a"
    page = (run / "report.html").read_text()
    assert "<h2>Decision boundary</h2>" in page
    assert "data:image/gif;base64," in page


def test_its_classes_have_names_in_predictions_from_another_directory(project: Path) -> None:
    with open(project.parent / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["target"], row["target_name"]) for row in rows} == {("0", "upper"), ("1", "lower")}


def test_files_that_are_there_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text("mine")
    assert main(["new", str(tmp_path)]) == 2
    assert "already has model.py" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]
    assert main(["new", str(tmp_path / "a" / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == FILES


def test_what_cant_be_written_as_a_whole_isnt_there(tmp_path: Path) -> None:
    """The limit on a file's size stands for a disk that is full: the schema is larger."""
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    code += "from dist_train.main import main; sys.exit(main(['new', 'a b']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "a b can't be written: [Errno 27] File too large" in done.stderr
    assert list((tmp_path / "a b").iterdir()) == []


def test_the_batch_script_is_the_one_of_launch(tmp_path: Path) -> None:
    shipped, original = ROOT / "dist_train/templates/train.sbatch", ROOT / "launch/slurm/train.sbatch"
    assert shipped.read_bytes() == original.read_bytes(), f"copy it again: cp {original} {shipped}"
    assert main(["new", str(tmp_path)]) == 0
    script = (tmp_path / "train.sbatch").read_text()
    assert "launch/" not in script
    assert "sbatch train.sbatch config.yaml" in script
