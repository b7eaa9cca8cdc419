"""Builds and installs the package the ways users do, from a copy of the tree and into a fresh environment.

Nothing is downloaded: the fresh environments borrow the packages of the one that runs the tests, except
rst_fused itself. These tests take minutes; `make packaging` runs them, `make test` does not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
FLAG = "RST_FUSED_BUILD_EXTENSION"
CUDA_FLAG = "RST_FUSED_BUILD_CUDA"
FOLDERS = ("csrc", "kernels", "rst_fused", "tests")
WARNING = "built WITHOUT the C++ extension"

# Trains for a few steps and reports what it ran on.
TRAIN_A_LITTLE = """
import importlib.util, json, torch, rst_fused
from rst_fused import RST, _backends
torch.manual_seed(0)
model, x = torch.nn.Linear(8, 1), torch.randn(32, 8)
opt = RST(model.parameters(), base="sgd", lr=0.1, momentum=0.9, rho=0.05, schedule=0.5)
def closure():
    opt.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    return loss
losses = [float(opt.step(closure)) for _ in range(30)]
print(json.dumps({
    "losses": [losses[0], losses[-1]],
    "backends": {b.name: b.available for b in _backends.backends()},
    "build": _backends.build_info(),
    "version": rst_fused.__version__,
    "package": rst_fused.__file__,
    "kernels": importlib.util.find_spec("rst_fused.kernels").origin,
}))
"""


def run(command: list[object], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run with stdout and stderr in one text; `variables` override the environment's."""
    inherited = {k: v for k, v in os.environ.items() if k not in (FLAG, "CC", "CXX", "PYTHONPATH")}
    inherited[CUDA_FLAG] = "0"  # nvcc takes minutes, and one test is about it
    inherited["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]])
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )


def copy_of_tree(target: Path) -> Path:
    target.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


class Environment:
    """A fresh virtual environment that sees the running one's packages, minus rst_fused and `without`."""

    def __init__(self, folder: Path, without: str | None = None):
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv/bin/python"
        self.bin = self.python.parent
        self.elsewhere = folder / "elsewhere"  # a working directory from which nothing can be imported
        self.elsewhere.mkdir()
        self.borrowed = folder / "borrowed"
        self.borrowed.mkdir()
        self.borrow(lambda name: without is None or not name.startswith(without))
        site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
        Path(site, "borrowed.pth").write_text(f"{self.borrowed}\n")

    def borrow(self, wanted: Callable[[str], bool]) -> None:
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            own = entry.suffix == ".pth" or entry.name.startswith(("rst_fused", "__editable__"))
            if not own and wanted(entry.name):
                (self.borrowed / entry.name).symlink_to(entry)

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(list(command), self.elsewhere, **variables)

    def pip(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        return self.run(*pip, *arguments, **variables)

    def install(self, *what: object, **variables: str) -> subprocess.CompletedProcess[str]:
        options = ["--verbose", "--no-build-isolation", "--no-deps", "--no-index"]
        return self.pip("install", *options, *what, **variables)

    def build_wheel(self, tree: Path, target: Path, **variables: str) -> Path:
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", target]
        done = self.pip("wheel", *options, tree, **variables)
        assert done.returncode == 0, done.stdout
        (wheel,) = target.glob("*.whl")
        return wheel

    def train_a_little(self) -> dict:
        done = self.run(self.python, "-c", TRAIN_A_LITTLE)
        assert done.returncode == 0, done.stdout
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["losses"][1] < report["losses"][0]
        return report


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_tree(tmp_path / "tree")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_of_tree(folder / "tree")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = run([sys.executable, "-c", build, folder], tree)
    assert done.returncode == 0, done.stdout
    (archive,) = folder.glob("rst_fused-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def compiled_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    return Environment(folder).build_wheel(sdist, folder / "wheel", **{FLAG: "1"})


def members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def top_level(wheel: Path) -> set[str]:
    return {name.split("/")[0] for name in members(wheel)}


def tree_files(tree: Path, folder: str) -> set[str]:
    files = (path for path in (tree / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(tree).as_posix() for path in files}


def version_in(tree: Path) -> str:
    lines = (tree / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def test_pure_wheel_holds_the_package_and_nothing_else(environment, tree, tmp_path):
    wheel = environment.build_wheel(tree, tmp_path / "wheel", **{FLAG: "0"})
    version = version_in(tree)
    assert wheel.name == f"rst_fused-{version}-py3-none-any.whl"
    assert top_level(wheel) == {"rst_fused", f"rst_fused-{version}.dist-info"}
    kernels = {f"rst_fused/{name}" for name in tree_files(tree, "kernels")}
    assert "rst_fused/kernels/__init__.py" in kernels
    packaged = {name for name in members(wheel) if name.startswith("rst_fused/")}
    assert packaged == tree_files(tree, "rst_fused") | kernels


def test_sdist_holds_all_that_a_build_needs(sdist):
    for folder in ("csrc", "kernels", "rst_fused"):
        assert tree_files(sdist, folder) == tree_files(sdist.parents[1] / "tree", folder)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"):
        assert (sdist / name).is_file(), name


def test_compiled_wheel_has_both_modules(compiled_wheel, sdist):
    version = version_in(sdist)
    assert top_level(compiled_wheel) == {"rst_fused", f"rst_fused-{version}.dist-info"}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    libraries = {name for name in members(compiled_wheel) if name.endswith(".so")}
    assert libraries == {"rst_fused/_C.abi3.so", f"rst_fused/_plan_ext{suffix}"}
    assert "none-any" not in compiled_wheel.name


def test_compiled_wheel_runs_on_the_cpu_backend(compiled_wheel, environment):
    done = environment.install(compiled_wheel)
    assert done.returncode == 0, done.stdout
    report = environment.train_a_little()
    assert report["backends"]["cpu"] and report["build"]
    info = environment.run(environment.bin / "rst-fused", "info")
    assert info.returncode == 0 and report["version"] in info.stdout, info.stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, from binutils, is not installed")
def test_torch_module_needs_no_unstable_symbol(compiled_wheel, tmp_path):
    """torch's C++ symbols differ between its versions: a binary that needs one loads in that version only."""
    with zipfile.ZipFile(compiled_wheel) as archive:
        library = archive.extract("rst_fused/_C.abi3.so", tmp_path)
    listing = run(["nm", "-DC", "--undefined-only", library], tmp_path)
    needed = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in needed)
    assert [name for name in needed if re.search(r"\b(at|c10|torch|caffe2)::", name)] == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_wheel_with_gpu_kernels_runs_without_a_gpu(environment, tree, tmp_path):
    """One architecture, by the variable that torch's own extensions use. It loads where there is no CUDA at all."""
    wheel = environment.build_wheel(
        tree, tmp_path / "wheel", **{FLAG: "1", CUDA_FLAG: "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    )
    assert environment.install(wheel).returncode == 0
    report = environment.train_a_little()
    assert report["backends"]["cpu"] and re.fullmatch(r"\d+\.\d+ for 9\.0", report["build"]["CUDA"])


def test_gpu_kernels_without_nvcc_fail_where_they_are_demanded(environment, tree):
    nowhere = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "CUDA_HOME": "/nowhere"}
    if shutil.which("nvcc", path=nowhere["PATH"]):
        pytest.skip("nvcc lies beside the system's programs")
    done = environment.install(tree, **{FLAG: "1", CUDA_FLAG: "1"}, **nowhere)
    assert done.returncode != 0 and "nvcc is not on PATH" in done.stdout


def test_editable_install_in_auto_mode(environment, tree):
    done = environment.install("--editable", tree, **{FLAG: "auto"})
    assert done.returncode == 0, done.stdout
    assert WARNING not in done.stdout
    report = environment.train_a_little()
    assert report["backends"]["cpu"]
    assert Path(report["package"]) == tree / "rst_fused/__init__.py"
    assert Path(report["kernels"]) == tree / "kernels/__init__.py"
    assert report["version"] == version_in(tree)
    done = environment.run(environment.python, "-c", "import kernels")
    assert "ModuleNotFoundError" in done.stdout


@pytest.mark.parametrize("compiler", ["absent", "broken"])
def test_without_a_compiler_auto_gives_pure_python(environment, tree, tmp_path, compiler):
    variables = {
        "absent": {"PATH": str(tmp_path / "empty")},
        "broken": {"CC": "/bin/false", "CXX": "/bin/false"},
    }
    done = environment.install(tree, **variables[compiler])
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(WARNING) == 1
    report = environment.train_a_little()
    assert report["build"] == {}
    assert report["backends"]["reference"] and not report["backends"]["cpu"]
    info = environment.run(environment.bin / "rst-fused", "info")
    assert info.returncode == 0 and "not built" in info.stdout


def test_without_a_compiler_1_fails(environment, tree):
    done = environment.install(tree, CC="/bin/false", CXX="/bin/false", **{FLAG: "1"})
    assert done.returncode != 0


@pytest.mark.parametrize("value", ["auto", "1"])
def test_source_that_does_not_compile(environment, tree, value):
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text("#error broken on purpose\n")
    done = environment.install(tree, **{FLAG: value})
    assert "#error broken on purpose" in done.stdout
    if value == "1":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stdout
    explanation = done.stdout.partition(WARNING)[2].partition("makes this an error")[0]
    assert "#error broken on purpose" in explanation
    assert environment.train_a_little()["build"] == {}


def test_half_a_build_is_no_build(environment, tree, tmp_path):
    """The first of the two modules compiles, the second does not."""
    for source in (tree / "csrc").rglob("*.cpp"):
        source.unlink()
    (tree / "csrc/torch/module.cpp").write_text("int nothing;\n")
    (tree / "csrc/plan/module.cpp").write_text("#error broken on purpose\n")
    wheel = environment.build_wheel(tree, tmp_path / "wheel")
    assert [name for name in members(wheel) if name.endswith(".so")] == []
    assert wheel.name.endswith("-py3-none-any.whl")


def test_without_torch_at_build_time(tmp_path, tree):
    environment = Environment(tmp_path, without="torch")
    done = environment.install(tree, **{FLAG: "1"})
    assert done.returncode != 0
    assert "torch cannot be imported" in done.stdout and "--no-build-isolation" in done.stdout

    done = environment.install(tree)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(WARNING) == 1
    environment.borrow(lambda name: name.startswith("torch"))
    assert environment.train_a_little()["build"] == {}


def test_torch_that_is_too_old_is_named(environment, tree, tmp_path):
    old = tmp_path / "old"
    (old / "torch/utils").mkdir(parents=True)
    (old / "torch/__init__.py").write_text("__version__ = '2.10.1+cpu'\n")
    (old / "torch/utils/__init__.py").touch()
    (old / "torch/utils/cpp_extension.py").touch()
    done = environment.install(tree, PYTHONPATH=str(old), **{FLAG: "1"})
    assert done.returncode != 0
    assert "torch 2.10.1+cpu is too old" in done.stdout


def test_unknown_flag_value_is_refused(environment, tree):
    done = environment.install(tree, **{FLAG: "banana"})
    assert done.returncode != 0
    assert f"{FLAG}='banana' is not understood: use auto, 0" in done.stdout
