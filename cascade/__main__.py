"""Where `cascadec` and `python -m cascade` begin: the command line, or a word on why there is none.

What the command line imports may be broken. Then `doctor`, which needs nothing, looks for the reason.
"""

from __future__ import annotations

import importlib
import sys

from cascade import doctor
from cascade.errors import CommandError, Diagnostic

BROKEN = 2


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    try:
        cli = importlib.import_module("cascade.cli")
    except ImportError as error:
        if sys.argv[1:2] == ["doctor"]:
            sys.exit(doctor.main())
        message, hint = f"cascadec cannot start: {error}", f"{sys.executable} -m cascade.doctor says what mends it"
        found = CommandError(Diagnostic("C624", message, help=hint))
        sys.stderr.write(f"{found}\n")
        sys.exit(BROKEN)
    cli.main()


if __name__ == "__main__":
    main()
