"""The error for what an adapter cannot compute."""


class UnsupportedError(ValueError):
    """A model or a call asks for something that sequence-parallel attention does not do; the message names it.

    An adapter raises this instead of leaving the feature out, which would train a different model without a word.
    """


def refuse(feature: str, instead: str) -> UnsupportedError:
    """The error to raise for `feature`, with what to do `instead`."""
    return UnsupportedError(f"sequence-parallel attention does not do {feature}: {instead}")
