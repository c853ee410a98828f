"""The command line: one verb per file. Thin over ``SteeredModel``; ``--help`` imports no torch.

Errors that ivg raises on purpose are printed in one line and exit with code 2.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``ivg``."""
    import typer

    from ivg.cli.app import app
    from ivg.cli.progress import report
    from ivg.errors import IVGError

    try:
        app(standalone_mode=False)
    except IVGError as e:
        report(str(e))
        sys.exit(2)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; what was done is kept", err=True)
        sys.exit(130)
    except Exception as e:
        show = getattr(e, "show", None)  # click's own errors: unknown option, missing argument
        if show is None:
            raise
        show()
        sys.exit(2)
