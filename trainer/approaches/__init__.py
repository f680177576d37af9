"""The ways to inform a separator's latent."""
