"""The name of orchestra on the package index, and the command that installs an extra.

The import and the command are ``orchestra``; on the package index that name belongs to another project. So each message
that tells a person to install something uses `install`. The name stands only here and in pyproject.toml, and a test
compares the two (tests/test_model_extras.py).
"""

from __future__ import annotations

from typing import Final

__all__ = ["DISTRIBUTION", "install"]

DISTRIBUTION: Final = "orchestra-kvm"
"""The project's name in pyproject.toml."""


def install(*extras: str) -> str:
    """The command that adds these extras. If orchestra is installed already, pip fetches only what the extras need."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"
