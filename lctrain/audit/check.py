"""The checks of `lctrain audit`: each says what it found, and what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lctrain.audit.history import DISCARDED, History
from lctrain.audit.moved import describe_moved, samples_text
from lctrain.data.digest import step_digest
from lctrain.data.identity import data_identity
from lctrain.data.samples import SampleSource

SHOWN = 5
"""Wrong steps that are listed one by one."""


@dataclasses.dataclass(frozen=True)
class Check:
    """text: what was looked at. wrong: one line per finding, empty if all is well."""

    name: str
    text: str
    wrong: tuple[str, ...] = ()


def audit(history: History, steps: int | None = None) -> list[Check]:
    """All checks. steps: compute the digests of at most this many steps again (see AuditConfig).

    UserError if the corpora are not there.
    """
    config = history.config
    source = SampleSource(config.data, config.trainer, config.model.vocab_size, "train")
    return [
        _each_step_once(history),
        _samples_contiguous(history),
        _digests(history, source, steps),
        _computed_again(history),
        _left_out(history),
        _checkpoints(history),
    ]


def _each_step_once(history: History) -> Check:
    counts = Counter(record.get("step", 0) for record in history.records)
    last = max(counts, default=0)
    missing = [step for step in range(1, last + 1) if step not in counts]
    wrong = [f"step {step} has {count} lines in metrics.jsonl" for step, count in counts.items() if count > 1]
    if missing:
        batch = history.config.trainer.global_batch
        wrong.append(
            f"step{'s' if len(missing) > 1 else ''} {_list(missing)} missing in metrics.jsonl"
            f" (samples {samples_text(missing[0], batch)}{' and others' if len(missing) > 1 else ''})"
        )
    newest = max(history.metas, default=0)
    if newest > last:
        wrong.append(f"there is a checkpoint of step {newest}, but metrics.jsonl ends with step {last}")
    return Check("steps", f"{last} of {history.config.trainer.steps} on record", tuple(wrong))


def _samples_contiguous(history: History) -> Check:
    batch = history.config.trainer.global_batch
    records = [record for record in history.records if record.get("step", 0) > 0]
    wrong = [
        f"step {record['step']}: {record.get('consumed')} samples used after it instead of {record['step'] * batch}"
        for record in records
        if record.get("consumed") != record["step"] * batch
    ]
    last = max((record["step"] for record in records), default=0)
    return Check("samples", f"0 to {last * batch - 1}, {batch} a step" if last else "none yet", _shortened(wrong))


def _digests(history: History, source: SampleSource, steps: int | None) -> Check:
    batch = history.config.trainer.global_batch
    recorded = {record["step"]: record.get("digest") for record in history.records if record.get("step", 0) > 0}
    chosen = _chosen(sorted(recorded), steps, [event["step"] for event in history.events if event["kind"] == "resume"])
    different = [step for step in chosen if recorded[step] != step_digest(source, step, batch)]
    wrong = [describe_moved(source, batch, step, recorded) for step in different[:SHOWN]]
    if len(different) > SHOWN:
        wrong.append(f"and {len(different) - SHOWN} more steps with other digests, the last of them step {different[-1]}")
    return Check("digests", f"{len(chosen)} of {len(recorded)} steps computed again from the corpora", tuple(wrong))


def _computed_again(history: History) -> Check:
    recorded = {record.get("step"): record.get("digest") for record in history.records}
    batch = history.config.trainer.global_batch
    twice, wrong = set(), []
    for event in history.events:
        for step, digest in event["steps"] if event["kind"] == DISCARDED else ():
            twice.add(step)
            if step in recorded and recorded[step] != digest:
                wrong.append(
                    f"step {step} was computed again after the restart from step {event['after']} with other samples than"
                    f" {samples_text(step, batch)}: digest {recorded[step]} instead of {digest}"
                )
    resumes = [event for event in history.events if event["kind"] == "resume"]
    worlds = {event["world_size"] for event in history.events if event["kind"] in ("start", "resume")}
    text = f"{len(resumes)} resume{'s' if len(resumes) != 1 else ''}"
    if resumes:
        text += f" (after step {_list(event['step'] for event in resumes)}; {_list(sorted(worlds))} processes)"
    return Check("restarts", f"{text}, {len(twice)} steps computed again", _shortened(wrong))


def _left_out(history: History) -> Check:
    """Batches left out must be known as such, in metrics and on the list alike; skipped updates are merely told."""
    records = {record["step"]: record for record in history.records if record.get("step", 0) > 0}
    listed = {entry.step: entry for entry in history.passed_over if entry.step in records}
    out = {step for step, record in records.items() if record.get("passed_over")}
    wrong = [f"step {step} was left out, but passed_over.json does not list it" for step in sorted(out - set(listed))]
    wrong += [
        f"step {step} was trained on, but passed_over.json lists it ({entry.problem})"
        for step, entry in sorted(listed.items())
        if step not in out
    ]
    wrong += [
        f"step {step} was left out with digest {records[step].get('digest')}, but passed_over.json says {entry.digest}"
        for step, entry in sorted(listed.items())
        if step in out and records[step].get("digest") != entry.digest
    ]
    skipped = sorted(step for step, record in records.items() if record.get("skipped") and step not in out)
    text = f"batches of {len(out)} steps" + (f" ({_list(sorted(out))})" if out else "")
    if skipped:
        text += f"; updates skipped in {len(skipped)} ({_list(skipped)})"
    return Check("left out", text, _shortened(wrong))


def _checkpoints(history: History) -> Check:
    identity, batch = data_identity(history.config), history.config.trainer.global_batch
    wrong = []
    for step, meta in sorted(history.metas.items()):
        if (meta["step"], meta["consumed"]) != (step, step * batch):
            wrong.append(f"checkpoint of step {step} says step {meta['step']}, {meta['consumed']} samples used")
        wrong += [
            f"checkpoint of step {step} was made with another {key}"
            for key, now in identity.items()
            if meta["data"].get(key) != now
        ]
    return Check("checkpoints", f"{len(history.metas)} with the data of the config", _shortened(wrong))


def _chosen(steps: list[int], most: int | None, resumes: list[int]) -> list[int]:
    """All steps, or at most `most`: the last, those before and after restarts, and others spread evenly."""
    if most is None or most >= len(steps):
        return steps
    there = set(steps)
    near = {step for resume in resumes for step in (resume, resume + 1) if step in there} | {steps[-1]}
    chosen = sorted(near)[-most:]
    left = most - len(chosen)
    others = [step for step in steps if step not in near]
    return sorted(chosen + [others[number * len(others) // left] for number in range(left)])


def _list(values: Iterable[Any]) -> str:
    texts = list(map(str, values))
    return ", ".join(texts[:10]) + (f" and {len(texts) - 10} more" if len(texts) > 10 else "")


def _shortened(lines: list[str]) -> tuple[str, ...]:
    return tuple(lines[:SHOWN]) + ((f"and {len(lines) - SHOWN} more like this",) if len(lines) > SHOWN else ())
