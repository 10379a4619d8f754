"""The program ``orchestra``."""

from __future__ import annotations

import sys

from .model.extras import install

__all__ = ["main"]

EXTRA = ("cyclopts", "rich")


def main() -> int:
    """Run the command line; the exit status."""
    try:
        from .cli import app, render  # noqa: F401  # both of the extra's libraries, or neither
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRA:
            raise
        print(f"orchestra: the command line needs {library}: {install('cli')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return app.main()


if __name__ == "__main__":
    sys.exit(main())
