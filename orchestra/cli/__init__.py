"""The command line: ``orchestra demo``, ``orchestra run``, ``orchestra doctor``,
``orchestra simulate``. Needs the extra ``cli``.

app                      commands, options, help (cyclopts); which error is which exit status
demo, run, doctor, ...   one module for each command
target                   what is wrong with a file to be written
story, account           the demo as it is played, and what was seen of it
words, plain, render     what is said; as lines, or as a live table (rich)
plot, whyplot, replayplot, svg   pictures of the demo, of a VM, of a replay, and what they share
"""

from __future__ import annotations

__all__: list[str] = []
