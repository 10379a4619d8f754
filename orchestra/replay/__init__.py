"""What would other policies have done? Goes through a journal once more, with the policy objects that run live.

Model and limits: docs/journal.md.

It may import the house and everything below, and no machine that runs.
The one to copy: `given.py`.
"""

from __future__ import annotations

from .response import Response
from .run import Replay, World, replay

__all__ = ["Replay", "Response", "World", "replay"]
