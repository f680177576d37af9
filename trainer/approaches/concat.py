"""Concatenate the mixture's embedding to the latent."""

from torch import Tensor, nn

from flsep.trainer.approaches.interface import Approach, _check_embeddings
from flsep.trainer.teacher import TeacherWindows


class _Concatenation(Approach):
    """Condition the decoders on the mixture's embedding, held over its window's frames."""

    def __init__(self, embedding_size: int, projection_size: int) -> None:
        super().__init__()
        self.condition_size = projection_size
        # Tanh: the range of the latent it is concatenated to.
        self.project = nn.Sequential(nn.Linear(embedding_size, projection_size), nn.Tanh())

    def condition(self, windows: TeacherWindows, num_frames: int) -> Tensor:
        _check_embeddings(windows, None)
        if windows.held.shape != (len(windows.embeddings), num_frames):
            raise ValueError(
                f"windows are held over {tuple(windows.held.shape)} (batch, frames): "
                f"the separator expects {(len(windows.embeddings), num_frames)}"
            )
        projected_BWP = self.project(windows.embeddings)
        index_BNP = windows.held[..., None].expand(-1, -1, projected_BWP.shape[-1])
        held_BNP: Tensor = projected_BWP.gather(1, index_BNP)
        return held_BNP.transpose(0, 1)
