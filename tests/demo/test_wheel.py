"""What `pip install mrcore` brings: the wheel alone, in a venv without the checkout, works in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from checkout import PROJECT
from daemons import own_address


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MRCORE_"))}
    return subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.slow
def test_the_demo_and_a_new_project_work_from_the_wheel_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"  # pip leaves a folder `build` in what it builds
    shutil.copytree(PROJECT / "mrcore", source / "mrcore", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    built = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", str(source)], tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("mrcore-*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv/lib").glob("python3*/site-packages")
    installed = run([*pip, "install", "--no-deps", "--no-index", f"--target={packages}", str(wheel)], tmp_path)
    assert installed.returncode == 0, installed.stderr
    # Its dependencies are those of this environment, without what makes the checkout importable here.
    shared = Path(sysconfig.get_paths()["purelib"])
    for path in shared.iterdir():
        if "mrcore" not in path.name and path.suffix != ".pth" and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    python = str(tmp_path / "venv/bin/python")
    program = tmp_path / "venv/bin/mrcore"
    program.write_text(f"#!{python}\nimport sys\nfrom mrcore.cli.main import main\nsys.exit(main())\n")
    program.chmod(0o755)
    folder, library = tmp_path / "empty", tmp_path / "library"
    folder.mkdir()
    library.mkdir()
    (library / "one.py").write_text("import os\nsize = os.stat('x').st_size\n")
    where = run([python, "-c", "import mrcore; print(mrcore.__file__)"], folder)
    assert where.stdout.startswith(str(packages)), "the checkout is not what is tested"
    address = own_address()
    own_address()  # of the second node
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(program), "demo", "--source", str(library), "--address", address]
    done = run(command, folder, PATH=path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^os +1 +1 ", done.stdout, re.MULTILINE) and "demo_section_shares run 2: succeeded" in done.stdout
    assert "$ mrcore cluster stop" in done.stdout, "commands are as one would type them"
    assert sorted(path.name for path in folder.iterdir()) == ["mrcore-demo"]
    next_steps = re.findall(r"^  (.*?)(?:   #.*)?$", done.stdout.split("Try next")[1], re.MULTILINE)
    assert next_steps[0] == "cd mrcore-demo" and "mrcore submit projects/word_count/job.yml" in next_steps
    word_count = folder / "mrcore-demo/projects/word_count/job.yml"
    word_count.write_text(word_count.read_text().replace("/usr/share/common-licenses", str(library)))
    typed = run(["bash", "-ec", "\n".join(next_steps)], folder, PATH=path, HOME=str(tmp_path), MRCORE_CONFIG="")
    assert typed.returncode == 0 and "word_count run 1: succeeded" in typed.stdout, typed.stdout + typed.stderr
    made = run(["bash", "-ec", "mrcore new mine && mrcore test mine"], folder, PATH=path, HOME=str(tmp_path))
    assert made.returncode == 0 and "3 passed" in made.stdout, made.stdout + made.stderr
