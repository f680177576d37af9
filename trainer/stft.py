"""The short-time Fourier transform and its inverse, with frames first.

Shape suffixes: S sources, B batch, C channels, T samples, N frames, F bins, K frames that overlap.
A spectrum is NBCF, a stack of them SNBCF.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def analyse(waveform_BCT: Tensor, n_fft: int, hop: int) -> Tensor:
    """Transform waveforms: periodic Hann window, centred, reflect-padded, not normalised.

    float32 [..., batch, channel, sample] becomes complex64 [..., frame, batch, channel, bin], with
    1 + samples // hop frames. A waveform too short to be reflected raises ValueError.
    """
    num_samples = waveform_BCT.shape[-1]
    if num_samples <= n_fft // 2:
        raise ValueError(
            f"a waveform of {num_samples} samples is too short for n_fft {n_fft}: "
            f"it needs more than {n_fft // 2} samples; pad it"
        )
    window_T = torch.hann_window(n_fft, dtype=waveform_BCT.dtype, device=waveform_BCT.device)
    # torch.stft takes a single leading axis.
    spectrum_XFN = torch.stft(
        waveform_BCT.reshape(-1, num_samples),
        n_fft,
        hop_length=hop,
        window=window_T,
        center=True,
        pad_mode="reflect",
        normalized=False,
        onesided=True,
        return_complex=True,
    )
    spectrum_BCFN: Tensor = spectrum_XFN.unflatten(0, waveform_BCT.shape[:-1])
    return spectrum_BCFN.movedim(-1, -4)


def synthesise(spectrum_NBCF: Tensor, hop: int, num_samples: int | None = None) -> Tensor:
    """Invert `analyse`: complex64 [..., frame, batch, channel, bin] to float32 waveforms.

    The length is hop * (frames - 1) samples unless `num_samples` is given.
    """
    waveform_BCT: Tensor = _Inverse.apply(spectrum_NBCF, hop, num_samples)
    return waveform_BCT


class _Inverse(torch.autograd.Function):
    """The inverse transform of spectra with frames first, and its adjoint.

    `torch.istft` takes frames last, and autograd differentiates through the copies that this needs.
    This function takes half the time and keeps no spectrum for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, spectrum_NBCF: Tensor, hop: int, num_samples: int | None) -> Tensor:
        num_frames, n_fft = spectrum_NBCF.shape[-4], 2 * (spectrum_NBCF.shape[-1] - 1)
        window_T = _window(n_fft, spectrum_NBCF)
        # The squared window added up: the gain of windowing twice, which is divided out below.
        envelope_T = _overlap_add(window_T.expand(num_frames, 1, 1, -1), window_T, hop)[0, 0]
        frames_NBCT = torch.fft.irfft(spectrum_NBCF, n_fft)
        padded_BCT = _overlap_add(frames_NBCT, window_T, hop)
        length = hop * (num_frames - 1) if num_samples is None else num_samples
        # Centring has put half a transform before the first sample.
        kept = slice(n_fft // 2, n_fft // 2 + length)
        waveform_BCT = padded_BCT[..., kept] / envelope_T[kept]
        ctx.save_for_backward(envelope_T[kept])
        ctx.hop, ctx.n_fft, ctx.num_frames = hop, n_fft, num_frames
        # The frames may end before the length that is asked for.
        return F.pad(waveform_BCT, (0, length - waveform_BCT.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (envelope_T,) = ctx.saved_tensors
        # The adjoint of each step of `forward`, in reverse order.
        grad_BCT = grads[0][..., : len(envelope_T)] / envelope_T
        before, hop, n_fft = ctx.n_fft // 2, ctx.hop, ctx.n_fft
        after = n_fft + hop * (ctx.num_frames - 1) - before - len(envelope_T)
        frames_BCNT = F.pad(grad_BCT, (before, after)).unfold(-1, n_fft, hop)
        windowed_NBCT = frames_BCNT.movedim(-2, -4) * _window(n_fft, grad_BCT)
        # irfft divides by n_fft, and so does its adjoint.
        grad_NBCF = torch.fft.rfft(windowed_NBCT, norm="forward")
        grad_NBCF[..., 1:-1] *= 2  # each bin stands for its conjugate, too
        return grad_NBCF, None, None


def _window(n_fft: int, like: Tensor) -> Tensor:
    return torch.hann_window(n_fft, dtype=like.real.dtype, device=like.device)


def _overlap_add(frames_NBCT: Tensor, window_T: Tensor, hop: int) -> Tensor:
    """Window frames and add them up where they overlap, to [..., batch, channel, sample]."""
    *lead, num_frames, batch, channels, length = frames_NBCT.shape
    num_pieces = -(-length // hop)
    fill = num_pieces * hop - length
    if fill:
        frames_NBCT, window_T = F.pad(frames_NBCT, (0, fill)), F.pad(window_T, (0, fill))
    # Cut into pieces of one hop, piece k of frame n falls on hop n + k of the sum: a loop over the
    # few pieces adds all frames at once.
    frames_BCNKT = frames_NBCT.movedim(-4, -2).unflatten(-1, (num_pieces, hop))
    window_KT = window_T.unflatten(-1, (num_pieces, hop))
    sum_BCNT = frames_NBCT.new_zeros(*lead, batch, channels, num_frames + num_pieces - 1, hop)
    for piece in range(num_pieces):
        place_BCNT = sum_BCNT[..., piece : piece + num_frames, :]
        place_BCNT.addcmul_(frames_BCNKT[..., piece, :], window_KT[piece])
    return sum_BCNT.flatten(-2)[..., : length + hop * (num_frames - 1)]
