"""Which pre-registration binds a profile, and whether this is the code that it was registered with."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

from nslora.runs.store import code, git
from nslora.types import Json, UserError

# begins the last line, which holds the checksum of all before it
SEAL = "# sha256 of all above: "


def path_of(root: Path) -> Path:
    """Return where a project's pre-registration is, or will be."""
    return root / "results" / "preregistration.toml"


def read(root: Path, profile: str) -> Json | None:
    """Return the pre-registration that binds a profile, if there is one; raises UserError where it is damaged."""
    path = path_of(root)
    if not path.exists():
        return None
    try:
        body, _, seal = path.read_text(encoding="utf-8").rpartition(f"\n{SEAL}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from git.") from None
    if seal != hashlib.sha256(body.encode()).hexdigest() + "\n":
        raise UserError(f"{path} is not as it was written: restore it from git.")
    content = tomllib.loads(body)
    return content if content["profile"] == profile else None


def require_frozen_code(root: Path, profile: str) -> None:
    """Raise UserError where a profile is registered, and this is other code than what it is registered with."""
    content = read(root, profile)
    if content and content["code"] != code():
        # the commit that has both the code and the pre-registration
        added = git("log", "--diff-filter=A", "-1", "--format=%h", "--", str(path_of(root)))
        raise UserError(
            f"profile {profile!r} is registered with the code of {content['revision'][:12]}, and this is other "
            f"code; run it there, in an environment of its own: git worktree add ../frozen {added} "
            "&& cd ../frozen && make .venv/ready."
        )
