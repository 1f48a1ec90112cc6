"""`lctrain verify attention`: every strategy on forked ranks against one process, case by case."""

from __future__ import annotations

import time
from collections.abc import Iterator

from lctrain.config.verify import AttentionVerifyConfig
from lctrain.console import counted, progress, say
from lctrain.errors import UserError
from lctrain.launch.ranks import RankError, run_ranks
from lctrain.verify.exact import Results, exact, one_process
from lctrain.verify.judge import TENSORS, Verdict, error_of, judge
from lctrain.verify.matrix import Case, cases, problems
from lctrain.verify.problem import Problem
from lctrain.verify.rank import run_cases
from lctrain.verify.report import Report
from lctrain.whole_file import check_output


def verify_attention(config: AttentionVerifyConfig) -> int:
    """Run the matrix, print the report; returns 1 if any case fails."""
    check_output("output", config.output)
    matrix = [
        (problem, [list(cases(config, i, problem, cp)) for cp in config.cp]) for i, problem in enumerate(problems(config))
    ]
    total = sum(len(group) for _, groups in matrix for group in groups)
    if not total:
        raise UserError(f"strategies={','.join(config.strategies or ())} cp={','.join(map(str, config.cp))}: no case fits both")
    say(f"{counted(total, 'case')} on {', '.join(map(str, config.cp))} processes, each against one process in fp64")
    report = Report()
    with progress("verify attention", total, "cases") as advance:
        for problem, groups in matrix:
            for verdicts, seconds in _verify(problem, groups):
                report.add(verdicts, seconds)
                advance(len(verdicts))
    report.print()
    report.store(config)
    return int(report.failed)


def _verify(problem: Problem, groups: list[list[Case]]) -> Iterator[tuple[list[Verdict], float]]:
    """Verdicts on each group of cases, all of one world size, and the seconds these took."""
    inputs, mask = problem.inputs(), problem.attention_mask()
    wanted = exact(inputs, mask)
    own = None
    if problem.dtype == "bf16":
        found = one_process(inputs, mask)
        tensors = [name for name in TENSORS if getattr(wanted, name) is not None]
        own = {name: error_of(name, getattr(found, name), getattr(wanted, name), rms=True) for name in tensors}
    for group in filter(None, groups):
        begin = time.monotonic()
        verdicts = _run(group, wanted, own)
        yield verdicts, time.monotonic() - begin


def _run(group: list[Case], wanted: Results, own: dict[str, float] | None) -> list[Verdict]:
    try:
        ranks = run_ranks(run_cases, group[0].cp, group, wanted)
    except RankError as error:
        if len(group) > 1:  # find the culprits
            return [verdict for case in group for verdict in _run([case], wanted, own)]
        return [Verdict(group[0], {}, None, (str(error).strip().splitlines()[-1],))]
    return [judge(case, shares, wanted, own) for case, shares in zip(group, zip(*ranks, strict=True), strict=True)]
