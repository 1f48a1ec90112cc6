"""Which samples a step really used, where they are not those it should have used."""

from __future__ import annotations

from lctrain.data.digest import step_digest, step_documents, step_samples
from lctrain.data.samples import SampleSource

NEAR = 200
"""Steps before and after the wrong one among which its samples are looked for."""
DOCUMENTS = 6


def describe_moved(source: SampleSource, batch: int, step: int, recorded: dict[int, str | None]) -> str:
    """One line on a step whose recorded digest is not that of its samples.

    recorded: digest by step, of the whole run, from which it follows whether a sample is lost or merely out of place.
    """
    digest = recorded[step]
    wanted = f"samples {samples_text(step, batch)} ({_documents(source, step, batch)})"
    if digest is None:
        return f"step {step}: no digest is on record; {wanted} cannot be proved"
    near = range(max(1, step - NEAR), step + NEAR + 1)
    used = next((other for other in near if step_digest(source, other, batch) == digest), None)
    if used is None:
        return (
            f"step {step}: digest {digest} instead of {step_digest(source, step, batch)}: not {wanted}, nor those of any"
            " step near it: the corpus has changed since, or the record has"
        )
    elsewhere = [other for other, text in recorded.items() if other != step and text == step_digest(source, step, batch)]
    fate = f"used in step {elsewhere[0]} instead" if elsewhere else "lost"
    again = [other for other, text in recorded.items() if other != step and text == digest]
    repeated = f", which step {again[0]} used too" if again else ""
    return (
        f"step {step}: {wanted} {'were' if elsewhere else 'are'} {fate}; it used samples {samples_text(used, batch)}"
        f" of step {used} ({_documents(source, used, batch)}){repeated}"
    )


def samples_text(step: int, batch: int) -> str:
    """`16 to 19`."""
    samples = step_samples(step, batch)
    return f"{samples[0]} to {samples[-1]}" if batch > 1 else f"{samples[0]}"


def _documents(source: SampleSource, step: int, batch: int) -> str:
    documents = step_documents(source, step, batch)
    shown = ", ".join(f"{document} of corpus {corpus}" for corpus, document in documents[:DOCUMENTS])
    more = f" and {len(documents) - DOCUMENTS} more" if len(documents) > DOCUMENTS else ""
    return f"document{'s' if len(documents) > 1 else ''} {shown}{more}"
