"""The only import of the C core. All other modules of orchestra import it from here.

It may import the words, for what it decodes. The one to copy in C: `ports.c`.
The one to copy: `records.py`.
"""

from __future__ import annotations

try:
    from ._core import ffi, lib
except ImportError as error:  # a source tree that was never built
    raise ImportError(
        "orchestra's C core is not built: run `pip install -e .` (or `python setup.py build_ext --inplace`) first"
    ) from error

__all__ = ["ffi", "lib"]
