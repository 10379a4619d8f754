"""What orchestra is called on the package index, and how a part of it that is missing is installed.

The import and the command are ``orchestra``; on the package index that name is somebody else's. So whatever tells a
person to install something says it through `install`, and the name stands here and in pyproject.toml alone
(tests/test_model_extras.py).
"""

from __future__ import annotations

from typing import Final

__all__ = ["DISTRIBUTION", "install"]

DISTRIBUTION: Final = "orchestra-kvm"
"""The project's name in pyproject.toml."""


def install(*extras: str) -> str:
    """The command that adds these extras. Where orchestra is installed already, pip fetches only what they need."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"
