"""Where an export may be written to."""

from pathlib import Path

from dialogpt_ds.errors import UserError

ORIGIN = "exported_from.json"
"""File in an export that says which optimizer step it is of, and the size and SHA-256 of each file."""


def check_target(path: str, overwrite: bool) -> Path:
    """Return the folder to write, absolute.

    Raises:
        UserError: something is there, and is not to be replaced; or it is not an earlier export, which alone may be.
    """
    target = Path(path).expanduser().absolute()
    if not target.exists():
        return target
    if not target.is_dir():
        raise UserError(f"{target} is a file; name a folder")
    if not overwrite:
        raise UserError(f"{target} exists; name another folder, or give --overwrite")
    if any(target.iterdir()) and not (target / ORIGIN).is_file():
        raise UserError(
            f"{target} is no earlier export (it has no {ORIGIN}), so --overwrite does not replace it; name another "
            "folder"
        )
    return target
