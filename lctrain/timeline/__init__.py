"""Timelines of sequence-parallel attention: simulated or measured, as a picture or as a trace."""
