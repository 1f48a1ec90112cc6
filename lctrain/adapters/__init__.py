"""Sequence-parallel attention inside other libraries' models: Hugging Face transformers and megatron-core.

Nothing else in lctrain imports these modules, and importing this package imports neither library.
"""
