"""The command line: ``orchestra demo``, ``orchestra run``, ``orchestra doctor``,
``orchestra simulate``. Needs the extra ``cli``.

app                      commands, options, help (cyclopts); which error is which exit status
demo, run, doctor, ...   one module for each command
render                   live tables (rich)
whyplot, replayplot      pictures of a VM and of a replay
interrupts               Ctrl-C as a cancellation

It may import everything.
The one to copy: `policy.py`.
"""

from __future__ import annotations

__all__: list[str] = []
