"""Compare latents and embeddings window by window."""

import torch
from torch import Tensor, nn

from flsep.trainer.approaches.interface import Approach, _check_embeddings
from flsep.trainer.parallel import gather_rows
from flsep.trainer.separators.interface import Separation
from flsep.trainer.teacher import TeacherWindows

# Keeps the gradient of a cosine finite at the zero vector.
_EPSILON = 1e-6


class _Regularizer(Approach):
    """Compare the latents of audible windows inside their excerpts with their embeddings.

    In training, the windows of all processes are compared with each other: those of a batch.
    """

    def __init__(
        self,
        criterion: nn.Module,
        *,
        sources: tuple[str, ...] | None,
        weight: float,
        silence_db: float,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.sources = sources
        self.weight = weight
        self.silence_db = silence_db

    def regularizer(self, separation: Separation, windows: TeacherWindows) -> dict[str, Tensor]:
        _check_embeddings(windows, self.sources)
        latent = separation.source_latents_SNBD if self.sources else separation.shared_latent_NBD
        with torch.autocast(latent.device.type, enabled=False):
            pooled = pool_windows(latent.float(), windows.bounds)
            compared = windows.inside & (windows.activity_db >= self.silence_db)
            latents_MD, embeddings_ME = pooled[compared], windows.embeddings[compared].float()
            if self.training:
                latents_MD, embeddings_ME = gather_rows(latents_MD), gather_rows(embeddings_ME)
            num_windows = torch.tensor(float(len(latents_MD)), device=latent.device)
            return {**self.criterion(latents_MD, embeddings_ME), "num_windows": num_windows}


def pool_windows(latent_NBD: Tensor, bounds: Tensor) -> Tensor:
    """Average a latent over each window.

    Parameters
    ----------
    latent_NBD : Tensor
        float [..., frame, batch, latent].
    bounds : Tensor
        First and one-past-last frame of each window, int64 [..., batch, window, 2]. Frames
        outside the latent do not count.

    Returns
    -------
    Tensor
        float [..., batch, window, latent]; zero for a window that holds no frame of the latent.
    """
    frames_N = torch.arange(latent_NBD.shape[-3], device=latent_NBD.device)
    held_BWN = (frames_N >= bounds[..., :1]) & (frames_N < bounds[..., 1:])
    shares_BWN = held_BWN / held_BWN.sum(-1, keepdim=True).clamp_min(1)
    return torch.einsum("...nbd,...bwn->...bwd", latent_NBD, shares_BWN.to(latent_NBD.dtype))
