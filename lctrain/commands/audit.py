"""Check that over all restarts of a run no sample was lost or used twice.

usage: lctrain audit RUN_DIR [steps=N]

  lctrain audit runs/demo
  lctrain audit runs/long steps=1000

Every step is on record once, its samples follow those of the step before, and their digest, computed again from the corpora,
is the recorded one; what was computed again after a restart was the same. Exit status 1 if not: the first step that is wrong
is named, with its samples and documents.
"""

from __future__ import annotations

from lctrain.config.audit import AuditConfig
from lctrain.config.load import load
from lctrain.config.watch import named_run


def main(args: list[str]) -> int:
    """Run the command."""
    config = load(AuditConfig, "audit", named_run(args))

    from lctrain.audit.check import audit
    from lctrain.audit.history import read_history
    from lctrain.console import say, table

    history = read_history(config.run)
    checks = audit(history, config.steps)
    table(("check", "result", ""), [(check.name, "wrong" if check.wrong else "ok", check.text) for check in checks])
    wrong = [line for check in checks for line in check.wrong]
    for line in wrong:
        say(line)
    if not wrong:
        say(f"{history.run.path}: no sample was lost or used twice")
    return 1 if wrong else 0
