"""The interface of an approach."""

from torch import Tensor, nn

from flsep.trainer.separators.interface import Separation
from flsep.trainer.teacher import TeacherWindows


class Approach(nn.Module):
    """Plain X-UMX, and the interface of the ways to inform it.

    Attributes
    ----------
    condition_size : int
        Number of features that `condition` gives for each frame; the separator's.
    weight : float
        Factor of the regularizer: total loss = separation loss + weight * regularizer.
    """

    condition_size: int = 0
    weight: float = 0.0

    def condition(self, windows: TeacherWindows, num_frames: int) -> Tensor | None:
        """Return features to concatenate to the shared latent.

        Parameters
        ----------
        windows : TeacherWindows
            The teacher's windows.
        num_frames : int
            Number of latent frames of the excerpt.

        Returns
        -------
        Tensor or None
            float [frame, batch, condition_size], or None.

        Raises
        ------
        ValueError
            If the windows do not fit.
        """
        return None

    def regularizer(self, separation: Separation, windows: TeacherWindows) -> dict[str, Tensor]:
        """Compare latents and embeddings.

        Parameters
        ----------
        separation : Separation
            The separator's latents.
        windows : TeacherWindows
            The teacher's windows.

        Returns
        -------
        dict of str to Tensor
            Empty, or float32 scalars: `regularizer`, the unweighted loss; and diagnostics without
            gradient: `num_windows` that were compared, and `retrieval_accuracy` (`contrastive`).

        Raises
        ------
        ValueError
            If the windows do not fit.
        """
        return {}


def _check_embeddings(windows: TeacherWindows, sources: tuple[str, ...] | None) -> None:
    shape = tuple(windows.embeddings.shape)
    if sources is None and len(shape) != 3:
        raise ValueError(
            f"embeddings of shape {shape}: expected the mixture's (batch, window, dim)"
        )
    if sources is not None and (len(shape) != 4 or shape[0] != len(sources)):
        raise ValueError(
            f"embeddings of shape {shape}: expected those of the {len(sources)} stems "
            f"{', '.join(sources)} as (source, batch, window, dim)"
        )
