"""infra/docker/Dockerfile, built for real: its steps by buildah, on a base that mmdebstrap makes.

The locks are cut down to a few packages each, so that minutes suffice; every step of the file runs
all the same. IMAGE_WHOLE=1 builds the target `cpu` with the locks as they are (about eight minutes
and 10 GB), and runs more in it; TORCH_CPU_INDEX names a mirror of PyTorch's index.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WHOLE = bool(os.environ.get("IMAGE_WHOLE"))
BASE = "localhost/ssr-base"
TOOLS = ("buildah", "mmdebstrap", "unshare", "ip")
# What `curate.py --help` and `ray --version` import; the archives that are built; one NVIDIA wheel.
FEW = {
    "main": """attrs charset-normalizer certifi click docstring-parser idna jsonargparse
        jsonschema jsonschema-specifications markdown-it-py mdurl msgpack numpy packaging pillow
        protobuf pyarrow pygments pyyaml ray referencing requests rich rpds-py typeshed-client
        urllib3""",
    "lavis": "fairscale iopath portalocker setuptools tqdm wheel",
    "torch": "filelock fsspec jinja2 markupsafe setuptools typing-extensions",
    "torch-cpu": "",
    "torch-cuda": "nvidia-nvtx",
}

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="building an image in a chroot takes root"),
]
for tool in TOOLS:
    pytestmark.append(
        pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool}; apt install {tool}")
    )


class Built:
    """An image in a storage of its own, mounted; and what its pods would run."""

    def __init__(self, buildah: list[str | Path], image: str) -> None:
        container = ran([*buildah, "from", image]).strip()
        self.root = Path(ran([*buildah, "mount", container]).strip())
        inspected = json.loads(ran([*buildah, "inspect", "--type", "image", image]))
        self.config: dict[str, Any] = inspected["OCIv1"]["config"]

    def pod(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """The command as the image's user, on a read-only root."""
        namespaces = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child"]
        return subprocess.run(
            [*namespaces, Path(__file__).with_name("pod.sh"), self.root, self.config["User"],
             "--ignore-environment", *self.config["Env"], *command],
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def says(self, *command: str, timeout: float = 120) -> str:
        done = self.pod(*command, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()


def ran(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def brought(command: list[str | Path]) -> str:
    """As `ran`, and twice again: what comes from mirrors does not always come."""
    for pause in (5, 20):
        with contextlib.suppress(AssertionError):
            return ran(command)
        time.sleep(pause)
    return ran(command)


def cut(lock: Path, names: set[str]) -> None:
    """Leave only these packages in a lock, with their hashes."""
    blocks = re.split(r"\n(?=[a-z0-9-]+==)", "\n" + lock.read_text())[1:]
    kept = [block for block in blocks if block.split("==")[0] in names]
    assert {block.split("==")[0] for block in kept} == names, lock.name
    lock.write_text("\n".join(kept) + "\n")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a build sees it, and something beside that it should not see."""
    folder = tmp_path_factory.mktemp("sources")
    for name in (".dockerignore", "LICENSE", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder / name)
    for name in ("infra/docker", "jobs", "pipeline", "ssr_model"):
        shutil.copytree(REPOSITORY / name, folder / name)
    (folder / ".env").write_text("AWS_SECRET_ACCESS_KEY=planted\n")
    (folder / "runs/mini").mkdir(parents=True)
    (folder / "runs/mini/planted").touch()
    if not WHOLE:
        for name, few in FEW.items():
            cut(folder / f"infra/docker/locks/{name}.txt", set(few.split()))
    return folder


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str | Path]]:
    """buildah on a storage that ends with the module, with the base image in it."""
    folder = tmp_path_factory.mktemp("storage")
    tool: list[str | Path] = ["buildah", "--root", folder / "root", "--runroot", folder / "run"]
    try:
        # unsafe-io, as in Debian's own images: dpkg would wait for the disk at every file
        options = ["--variant=minbase", "--dpkgopt=force-unsafe-io"]
        brought(["mmdebstrap", "--quiet", *options, "bookworm", folder / "base.tar"])
        base = ran([*tool, "from", "scratch"]).strip()
        ran([*tool, "add", base, folder / "base.tar", "/"])
        ran([*tool, "copy", base, site(folder / "site"), "/"])
        ran([*tool, "commit", "--rm", base, BASE])
        (folder / "base.tar").unlink()
        yield tool
    finally:
        subprocess.run([*tool, "umount", "--all"], capture_output=True)
        subprocess.run([*tool, "rm", "--all"], capture_output=True)
        subprocess.run([*tool, "rmi", "--all", "--force"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def site(folder: Path) -> Path:
    """What a site puts into its base: certificates of its own, and which mirrors to ask."""
    certificates = Path("/usr/local/share/ca-certificates")
    if certificates.is_dir():
        shutil.copytree(certificates, folder / certificates.relative_to("/"))
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    (folder / "etc/uv").mkdir(parents=True)
    (folder / "etc/pip.conf").write_text(
        f"[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nindex-url = {index}\n"
    )
    (folder / "etc/uv/uv.toml").write_text(
        f'native-tls = true\n[[index]]\nurl = "{index}"\ndefault = true\n'
    )
    return folder


def build(buildah: list[str | Path], sources: Path, target: str) -> Built:
    index = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
    command = [
        *buildah, "build", "--isolation", "chroot", "--layers", "--format", "docker",
        "--file", sources / "infra/docker/Dockerfile", "--target", target,
        "--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", f"TORCH_CPU_INDEX={index}",
        "--build-arg", "VERSION=0.1.0", "--build-arg", "REVISION=abc",
        "--tag", f"localhost/ssr-{target}",
    ]  # fmt: skip
    if Path(index).is_dir():
        command += ["--volume", f"{index}:{index}:ro"]
    brought([*command, sources])
    return Built(buildah, f"localhost/ssr-{target}")


@pytest.fixture(scope="module")
def cpu(sources: Path, buildah: list[str | Path]) -> Built:
    return build(buildah, sources, "cpu")


@pytest.fixture(scope="module")
def cuda(sources: Path, buildah: list[str | Path]) -> Built:
    if WHOLE:
        pytest.skip("the CUDA build of torch is 3 GB more; the short form builds this target")
    return build(buildah, sources, "cuda")


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def image(request: pytest.FixtureRequest) -> Built:
    built: Built = request.getfixturevalue(request.param)
    return built


def test_the_user_is_not_root(image: Built) -> None:
    assert image.config["User"] == "1000:1000"
    assert image.says("id", "-un") == "ray"
    assert (
        image.says("bash", "-c", "cd && pwd && touch here /tmp/here /dev/shm/here") == "/home/ray"
    )
    assert image.says("find", "/usr", "/opt", "-perm", "/6000", "-type", "f") == ""


def test_nothing_of_the_image_is_writable(image: Built) -> None:
    """By its owners and modes, too: a pod whose root is not read-only is no worse."""
    assert image.pod("touch", "/opt/ssr/there").returncode != 0
    modes = image.says(
        "find", "/opt", "/usr", "/etc/profile.d", "/etc/passwd", "-not", "-type", "l",
        "(", "-user", "1000", "-o", "-group", "1000", "-o", "-perm", "-o=w", ")",
    )  # fmt: skip
    assert modes == ""


def test_kuberay_finds_what_it_calls(image: Built) -> None:
    """Its containers start by `bash -c`, or by a login shell; probes and waits call these."""
    for shell in (["bash", "-c", "--"], ["bash", "-lc", "--"]):
        assert image.says(*shell, "which ray python") == "/opt/venv/bin/ray\n/opt/venv/bin/python"
        assert image.says(*shell, "ray --version").startswith("ray, version 2.60.0")
    assert image.says("which", "wget", "grep", "sleep").count("\n") == 2


def test_there_is_nothing_to_install_with(image: Built) -> None:
    assert image.pod("which", "pip", "pip3", "uv", "g++").stdout == ""
    assert image.pod("python", "-m", "pip").returncode != 0


def test_both_environments_are_there(image: Built) -> None:
    assert image.config["WorkingDir"] == "/opt/ssr"
    version = "import sys, pipeline; print(sys.version_info[:2], pipeline.__file__)"
    for python in ("python", "/opt/lavis/bin/python"):
        assert image.says(python, "-c", version) == "(3, 11) /opt/ssr/pipeline/__init__.py"
    shared = "import fsspec; print(fsspec.__file__)"  # by torch's environment, in both
    assert image.says("/opt/lavis/bin/python", "-c", shared).startswith("/opt/torch/")
    built = "from importlib.metadata import version as v; print(v('fairscale'), v('iopath'))"
    assert image.says("/opt/lavis/bin/python", "-c", built) == "0.4.4 0.1.10"


def test_the_code_is_there_and_nothing_else(image: Built) -> None:
    assert image.says(*image.config["Cmd"]).startswith("usage: python jobs/curate.py")
    here = "LICENSE infra jobs pipeline pyproject.toml ssr_model"
    assert image.says("ls", "-A", "/opt/ssr").split() == here.split()
    assert image.says("find", "/opt/ssr/infra", "-type", "f", "-not", "-path", "*/locks/*") == ""


def test_labels(image: Built) -> None:
    labels = {k.rpartition(".")[2]: v for k, v in image.config["Labels"].items()}
    assert labels["version"] == "0.1.0" and labels["revision"] == "abc"
    assert labels["licenses"] == "Apache-2.0" and labels["name"] == BASE


def test_rdma_and_a_compiler_are_in_the_cuda_target_only(cpu: Built, cuda: Built) -> None:
    libraries = "ls /usr/lib/x86_64-linux-gnu/libibverbs/ /usr/include/python3.11/Python.h"
    assert "libmlx5" in cuda.says("bash", "-c", libraries)
    assert "gcc" in cuda.says("which", "gcc", "ibv_devinfo")
    assert cpu.pod("bash", "-c", libraries).returncode != 0
    assert not any(line.startswith("NVIDIA_VISIBLE_DEVICES") for line in cuda.config["Env"])


@pytest.mark.skipif(not WHOLE, reason="only in the whole image; set IMAGE_WHOLE=1")
def test_the_whole_image_works(cpu: Built) -> None:
    lavis = "pipeline.curation.captioning.lavis_environment"
    told = json.loads(cpu.says("/opt/lavis/bin/python", "-m", lavis).splitlines()[-1])
    assert told["ray"] == "2.60.0" and told["torch"].endswith("+cpu")
    run = ["python", "jobs/curate.py", "--preset", "mini-short", "--root", "/tmp/mini"]
    run += ["--download.timeout_s", "10"]
    assert "features:" in cpu.says(*run, timeout=900)
