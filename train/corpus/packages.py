"""The packages that the corpus is made of: fetched by the registries' own clients, checked, and read without unpacking."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..finished import finished_directory

MANIFEST = Path(__file__).parent / "manifest.json"
COMMANDS = {
    "debian": ["apt-get", "download", "-q"],
    "pypi": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"],
}
PINS = {"debian": "=", "pypi": "=="}


@dataclass(frozen=True)
class Package:
    """One row of `manifest.json`: a package, where it is from, under which licence, and how its text is read."""

    name: str
    registry: str  # debian or pypi
    version: str
    sha256: str  # of the .deb or .whl
    licence: str
    contents: str
    reader: str  # a key of `readers.READERS`
    files: str  # pattern of the paths that are read
    prose: bool  # in which every paragraph counts, however short


def manifest() -> list[Package]:
    return [Package(**row) for row in json.loads(MANIFEST.read_text(encoding="utf-8"))]


def fetch(package: Package, folder: Path, any_version: bool = False) -> Path:
    """The package's archive in `folder/NAME`, fetched unless it is there; with `any_version` whatever the registry offers.

    Raises:
        ValueError: the client is missing, the registry does not answer or has another version, or the checksum is wrong.
    """
    target = folder / package.name
    if not target.exists():
        with finished_directory(target) as partial:
            _download(package, partial, any_version)
            _check(package, _archive(package, partial), any_version)
    archive = _archive(package, target)
    _check(package, archive, any_version)
    return archive


def _download(package: Package, folder: Path, any_version: bool) -> None:
    wanted = package.name if any_version else f"{package.name}{PINS[package.registry]}{package.version}"
    command = [*COMMANDS[package.registry], wanted]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"`{command[0]}` is missing, which fetches {wanted} from {package.registry}.") from error
    if run.returncode:
        said = (run.stderr.strip() or run.stdout.strip() or "nothing").splitlines()[-1]
        hint = "" if any_version else " --any-version takes the version that the registry has now."
        raise ValueError(f"{wanted} could not be fetched from {package.registry}; {command[0]} says: {said}.{hint}")


def _archive(package: Package, folder: Path) -> Path:
    archives = [path for path in folder.iterdir() if path.suffix in (".deb", ".whl")]
    if len(archives) != 1:
        raise ValueError(f"{folder} has {len(archives)} archives; allowed: one, of {package.name}. Remove the folder.")
    return archives[0]


def _check(package: Package, archive: Path, any_version: bool) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256 and not any_version:
        raise ValueError(f"{archive} has the checksum {found}; allowed: {package.sha256}, of {package.version}. Remove it.")


def members(package: Package, archive: Path) -> list[tuple[str, bytes]]:
    """Paths and contents of the files that the package's pattern names, sorted by path."""
    found = sorted((_debian if archive.suffix == ".deb" else _wheel)(archive, package.files))
    if not found:
        raise ValueError(f"{archive} has no file {package.files}; allowed: a version that has, as {package.version}.")
    return found


def _debian(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    try:
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{archive} could not be read by dpkg-deb: {error}.") from error
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        for member in files:
            path = member.name.removeprefix("./")
            if member.isfile() and fnmatch(path, pattern):
                yield path, files.extractfile(member).read()


def _wheel(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as files:
        yield from ((path, files.read(path)) for path in files.namelist() if fnmatch(path, pattern))
