"""Ways to inform a separator's latent: the interface, and one file for each approach.

Hung and Lerch, "Feature-informed latent space regularization for music source separation", 2021
(arXiv 2203.09132), bring pretrained features into the latent space of a separator in three ways:
concatenation, contrastive regularization and distance-based regularization. The ideas are theirs;
where the paper is silent (projection, temperature, masking, what counts as a negative) the choices
are ours.
"""
