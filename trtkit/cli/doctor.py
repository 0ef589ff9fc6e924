"""`trtkit doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag

H2O = Annotated[bool, typer.Option("--h2o", help="Also look for every name that H2O's adapters lean on.")]
Require = Annotated[str | None, typer.Option(help="Fail (exit code 6) unless this target is possible here.")]


def command(h2o: H2O = False, require: Require = None, as_json: JsonFlag = False) -> None:
    """What is installed, and which targets, precisions and KV policies are possible on this machine, with reasons."""
    from trtkit.backends.doctor import diagnose, render
    from trtkit.cli.common import emit
    from trtkit.spec.errors import UsageError
    from trtkit.spec.plan import TARGETS

    if require is not None and require not in TARGETS:
        raise UsageError(f"--require {require}: allowed are {', '.join(TARGETS)}")
    diagnosis = diagnose(plugins=h2o)
    emit(diagnosis, render(diagnosis), as_json=as_json)
    if require is not None:
        diagnosis.require(require)
