"""The package: three source folders that are one, in a checkout and in a wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import torchstage
import torchstage.loaders
import torchstage.transforms

ROOT = Path(__file__).parents[1]
FOLDERS = {"torchstage": "torchstage", "torchstage.transforms": "transforms", "torchstage.loaders": "loaders"}


def pyproject() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("reading pyproject.toml needs tomllib, which is new in Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk() -> set[str]:
    """Every folder with Python files below the three source folders; links are looked at where they lead to."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            if not any((ROOT / folder / Path(*inside[: n + 1])).is_symlink() for n in range(len(inside))):
                found.add(".".join([package, *inside]))
    return found


def folder_of(package: str) -> Path:
    top = next(top for top in sorted(FOLDERS, key=len, reverse=True) if f"{package}.".startswith(f"{top}."))
    return (
        ROOT.joinpath(FOLDERS[top], *package[len(top) :].strip(".").split("."))
        if package != top
        else ROOT / FOLDERS[top]
    )


def test_the_packages_on_disk_are_those_that_are_installed() -> None:
    settings = pyproject()["tool"]["setuptools"]
    assert packages_on_disk() == set(settings["packages"])
    assert settings["package-dir"] == FOLDERS


def test_every_package_has_an_init() -> None:
    assert [folder for folder in FOLDERS.values() if not (ROOT / folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", ["transforms", "loaders"])
def test_the_links_of_a_checkout_lead_to_the_source_folders(name: str) -> None:
    link = ROOT / "torchstage" / name
    if not link.is_symlink():
        pytest.skip("this checkout was made without symbolic links")
    assert os.readlink(link) == os.path.join("..", name)
    assert link.resolve() == ROOT / name


def test_the_imported_packages_are_those_of_this_checkout() -> None:
    for module, folder in ((torchstage.transforms, "transforms"), (torchstage.loaders, "loaders")):
        assert module.__file__ is not None
        assert Path(module.__file__).resolve() == ROOT / folder / "__init__.py"


def test_no_module_is_imported_twice_under_two_names() -> None:
    files = [getattr(m, "__file__", None) for n, m in sys.modules.items() if n.split(".")[0] in set(FOLDERS.values())]
    real = [Path(file).resolve() for file in files if file]
    assert len(real) == len(set(real)) > 10


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the build leaves nothing in the checkout."""
    if importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building a wheel without network needs setuptools >= 77 to be installed")
    if importlib.util.find_spec("pip") is None:
        pytest.skip("building a wheel needs pip to be installed")
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", ".*")
    for name in (*FOLDERS.values(), "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, copy / file)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--quiet", "-w", str(target)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.iterdir()
    return built


def test_the_wheel_holds_every_module_the_types_and_the_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    modules = {
        f"{package.replace('.', '/')}/{path.name}"
        for package in packages_on_disk()
        for path in folder_of(package).glob("*.py")
    }
    data = {"torchstage/py.typed", "torchstage/data/adult.csv.gz", "torchstage/data/README.md"}
    pages = {f"torchstage/_explain/page.{kind}" for kind in ("html", "css", "js")}
    assert inside == modules | data | pages


def test_the_wheel_is_pure_and_carries_its_licences_and_needs(wheel: Path) -> None:
    assert re.fullmatch(r"torchstage-[\d.]+-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        (metadata_name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(metadata_name).decode()
        licences = {name.partition("/licenses/")[2] for name in archive.namelist() if "/licenses/" in name}
        attribution = archive.read("torchstage/data/README.md").decode()
    assert licences == {"LICENSE", "torchstage/data/README.md"}
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert needs == ["Requires-Dist: torch>=2.6", "Requires-Dist: numpy>=1.26"]
    assert "CC BY 4.0" in attribution


def test_the_wheel_works_alone_and_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import importlib.resources, pathlib, pkgutil, importlib, gzip, sys\n"
        "import torchstage, torchstage.transforms, torchstage.loaders\n"
        "names = [m.name for m in pkgutil.walk_packages(torchstage.__path__, 'torchstage.') if '__main__' not in m.name]\n"
        "modules = [importlib.import_module(name) for name in names]\n"
        "site = pathlib.Path(sys.argv[1]).resolve()\n"
        "assert all(pathlib.Path(m.__file__).resolve().is_relative_to(site) for m in [torchstage, *modules]), modules\n"
        "data = importlib.resources.files('torchstage') / 'data' / 'adult.csv.gz'\n"
        "with data.open('rb') as packed, gzip.open(packed, 'rt') as rows:\n"
        "    print(sum(1 for _ in rows))\n"
        "print(len(names))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, str(site)]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    rows, modules = done.stdout.split()
    assert int(rows) == 48_842 + 1
    assert int(modules) > 20
