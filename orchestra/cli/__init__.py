"""The command line: ``orchestra demo``, ``orchestra run``, ``orchestra doctor``,
``orchestra simulate``. Needs the extra ``cli``.

app                      commands, options, help (cyclopts)
demo, run, doctor, simulate   one module for each command
story, account           the demo as it is played, and what was seen of it
words, plain, render     what is said; as lines, or as a live table (rich); `plot` as a picture
"""

from __future__ import annotations

__all__: list[str] = []
