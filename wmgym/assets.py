"""Where the files that ship with wmgym lie.

A wheel carries them inside the package as `wmgym/_assets`; a checkout has them in `assets/` beside
the package. Everything that reads a shipped file asks here.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


class AssetError(FileNotFoundError):
    """A shipped file is absent; the message names it and the folder that was searched."""


def asset_path(*parts: str) -> Path:
    """Path of a shipped file or folder.

    Args:
        *parts: Path below the assets folder, for example `"lpips", "alexnet.safetensors"`; none for
            the folder itself.

    Returns:
        An existing path.

    Raises:
        AssetError: There is no such file or folder.
    """
    installed = _PACKAGE / "_assets"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "assets"
    path = folder.joinpath(*parts)
    if not path.exists():
        raise AssetError(
            f"wmgym's file '{'/'.join(parts) or 'assets'}' is missing: {path} does not exist. "
            "Reinstall wmgym, or restore the folder 'assets' of the checkout"
        )
    return path
