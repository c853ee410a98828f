"""The command line: one verb per file. Thin over ``GuidedModel``; ``--help`` imports no torch.

ivg's own errors are printed in one line, with exit code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

_STORAGE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
}
"""System errors that users can fix: full disk, no permission, a folder in place of a file …"""


def main() -> None:
    """Entry point of ``ivg``."""
    import typer

    from ivg.cli.app import app
    from ivg.cli.progress import print_error
    from ivg.cli.quick_import import begin_process
    from ivg.errors import IVGError

    begin_process()
    _occupy_standard_streams()
    stopped = 130
    try:
        code = app(standalone_mode=False) or 0  # without standalone mode, typer.Exit comes back as its code
    except IVGError as e:
        print_error(str(e))
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = stopped
    except OSError as e:  # a closed pipe is handled by typer
        if e.errno not in _STORAGE:
            raise
        hint = "\n  expected a folder, and a file has that name" if e.errno in (errno.EEXIST, errno.ENOTDIR) else ""
        print_error(f"{e.strerror}" + (f": {e.filename}" if e.filename else "") + hint)
        code = 2
    except Exception as e:
        show = getattr(e, "show", None)  # click's own errors: unknown option, missing argument
        if show is None:
            raise
        show()
        code = 2
    if code == stopped:
        typer.echo("stopped; what was done is kept", err=True)
    sys.exit(code)


def _occupy_standard_streams() -> None:
    """Reopen closed standard streams on the null device, so that no file gets their numbers and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
