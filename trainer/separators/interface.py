"""The interface of a separator."""

from typing import NamedTuple

from torch import Tensor


class Separation(NamedTuple):
    """What the separator gives for a batch of mixtures.

    Attributes
    ----------
    estimates_SNBCF : Tensor
        Magnitudes of the sources, float32 [source, frame, batch, channel, bin], >= 0.
    shared_latent_NBD : Tensor
        Latent after bridge 2, the mean of `source_latents_SNBD` over the sources.
    source_latents_SNBD : Tensor
        Each source's own latent before bridge 2: its encoder's output and its BLSTM's, both
        in (-1, 1); D is twice the hidden size.
    """

    estimates_SNBCF: Tensor  # noqa: N815
    shared_latent_NBD: Tensor  # noqa: N815
    source_latents_SNBD: Tensor  # noqa: N815
