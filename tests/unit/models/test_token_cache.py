"""What decoding keeps is what it was given."""

import torch

from lctrain.models.token_cache import TokenCache


def test_pieces_add_up_to_the_whole() -> None:
    whole = torch.randn(2, 23, 3)
    cache, at = TokenCache(), 0
    for size in (1, 4, 1, 1, 10, 6):
        everything = cache.append(whole[:, at : at + size])
        at += size
        assert cache.tokens == at
        torch.testing.assert_close(everything, whole[:, :at], rtol=0, atol=0)
