"""What would other policies have done? A journal's afternoon once more, under the policy objects that run live.

Model and limits: docs/journal.md.
"""

from __future__ import annotations

from .response import Response
from .run import Replay, World, replay

__all__ = ["Replay", "Response", "World", "replay"]
