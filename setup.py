"""Builds personvit._C (and personvit._C_cuda) with CMake. Everything else about the package is in pyproject.toml.

Environment: PERSONVIT_CUDA=AUTO|ON|OFF, PERSONVIT_CUDA_ARCHS="80-real;90-real", CMAKE_ARGS, MAX_JOBS.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _tool(name: str) -> str:
    """The tool beside this Python (pip put it there) before the one of the system."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"error: {name} was not found. Install it: {sys.executable} -m pip install {name}")
    return found


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")  # where it lies; importing it would cost seconds
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: torch was not found. Install it: {sys.executable} -m pip install 'torch>=2.11'")
    return Path(spec.origin).parent


def _is_isolated() -> bool:
    """Whether pip, build or uv made an environment for this build alone: its paths are gone afterwards."""
    makers = ("pip-build-env-", "build-env-", "builds-v")
    return any(part.startswith(makers) for part in _torch_folder().parts)


class CMakeBuild(build_ext):
    """Runs CMake in a folder that is kept between calls, and puts every module that it built into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        """The operators are registered with torch, no Python symbol is used: no Python version in the name."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, copy."""
        # CMake's cache names torch, Python and nvcc by path: a folder for each set of them.
        paths = (_torch_folder(), sys.executable, os.environ.get("CUDA_HOME"), shutil.which("nvcc"))
        folder = ROOT / "build" / f"cmake-{hashlib.sha256(repr(paths).encode()).hexdigest()[:10]}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._install(self._run_cmake(folder), self._built_folder(ext))
        finally:
            if _is_isolated():
                shutil.rmtree(folder, ignore_errors=True)

    def copy_extensions_to_source(self) -> None:
        """For an editable or in-place build; setuptools itself would copy the declared module only."""
        for ext in self.extensions:
            self._install(sorted(self._built_folder(ext).glob("_C*.so")), ROOT / "personvit")

    def _built_folder(self, ext: Extension) -> Path:
        return Path(self.build_lib).resolve().joinpath(*ext.name.split(".")[:-1])

    def _install(self, modules: list[Path], target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        (target / "_C_cuda.so").unlink(missing_ok=True)  # may be left from a build with CUDA
        for module in modules:
            # Not written over in place: a process that has the old one loaded keeps it.
            (target / module.name).unlink(missing_ok=True)
            shutil.copy2(module, target / module.name)

    def _run_cmake(self, folder: Path) -> list[Path]:
        cmake = _tool("cmake")
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
        options.append(f"-DPERSONVIT_CUDA={os.environ.get('PERSONVIT_CUDA', 'AUTO')}")
        if "PERSONVIT_CUDA_ARCHS" in os.environ:
            options.append(f"-DPERSONVIT_CUDA_ARCHS={os.environ['PERSONVIT_CUDA_ARCHS']}")
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        for module in folder.glob("_C*.so"):
            module.unlink()  # what this call does not build must not be installed
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *options], check=True)
        subprocess.run([cmake, "--build", str(folder), "-j", jobs], check=True)
        return sorted(folder.glob("_C*.so"))


setup(
    packages=[*find_packages(include=["personvit", "personvit.*"]), "personvit.kernels"],
    package_dir={"personvit.kernels": "kernels"},
    ext_modules=[Extension("personvit._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
