"""Ways to inform a separator's latent: the interface, and one file for each approach.

The ideas are those of Hung and Lerch, "Feature-informed latent space regularization for music
source separation", 2021 (arXiv 2203.09132). Where the paper is silent (projection, temperature,
masking, what counts as a negative) the choices are ours.
"""
