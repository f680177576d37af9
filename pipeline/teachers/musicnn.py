"""The VGG tagger of the package musicnn as TensorFlow operations.

Pons and Serra (2019), "musicnn: pre-trained convolutional neural networks for music audio tagging",
arXiv 1909.06654; the model MTT_vgg, trained on MagnaTagATune. Unlike in the package, frames are not
centred, so that the embedding of a patch does not depend on the audio around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAMPLE_RATE_HZ = 16000
DIM = 256
TAGS = (
    "guitar", "classical", "slow", "techno", "strings", "drums", "electronic", "rock", "fast",
    "piano", "ambient", "beat", "violin", "vocal", "synth", "female", "indian", "opera", "male",
    "singing", "vocals", "no vocals", "harpsichord", "loud", "quiet", "flute", "woman",
    "male vocal", "no vocal", "pop", "soft", "sitar", "solo", "man", "classic", "choir", "voice",
    "new age", "dance", "male voice", "female vocal", "beats", "harp", "cello", "no voice",
    "weird", "country", "metal", "female voice", "choral",
)  # fmt: skip

_FFT_SIZE, _FRAME_HOP_SAMPLES, _NUM_MELS, _PATCH_FRAMES = 512, 256, 96, 187
_NUM_CONVOLUTIONS, _NUM_FILTERS = 5, 128
_POOLS = (((4, 1), 2), (2, 2), (2, 2), (2, 2), (4, 4))  # size, stride
_NORM_EPSILON = 1e-3
# An array of the first layers takes 9 MB a patch, and larger batches are not faster.
_PATCHES_AT_ONCE = 16

SHAPES: dict[str, tuple[int, ...]] = {
    **{
        f"{layer}CNN/{kind}": (3, 3, 1 if layer == 1 else _NUM_FILTERS, _NUM_FILTERS)
        if kind == "kernel"
        else (_NUM_FILTERS,)
        for layer in range(1, _NUM_CONVOLUTIONS + 1)
        for kind in ("kernel", "bias")
    },
    **{
        f"batch_normalization{f'_{layer}' if layer else ''}/{kind}": (_NUM_FILTERS if layer else 1,)
        for layer in range(_NUM_CONVOLUTIONS + 1)
        for kind in ("beta", "gamma", "moving_mean", "moving_variance")
    },
    "dense/kernel": (DIM, len(TAGS)),
    "dense/bias": (len(TAGS),),
}
"""Shapes of the checkpoint's variables."""


def log_mel(tf: Any, waveform: Any) -> Any:
    """Compute the patches that the network sees from mono audio at 16 kHz, float32 [..., sample].

    Returns
    -------
    float32 [..., window, 187, 96]
        ``log10(1 + 10000 mel)``: periodic Hann windows of 512 samples every 256, not centred; 96
        Slaney mel bands of the power, 0-8000 Hz; patches of 187 frames without overlap.
    """
    # Only an export needs librosa: the saved graph holds the bands as a constant.
    import librosa

    spectrum = tf.signal.stft(waveform, _FFT_SIZE, _FRAME_HOP_SAMPLES)
    bands = librosa.filters.mel(sr=SAMPLE_RATE_HZ, n_fft=_FFT_SIZE, n_mels=_NUM_MELS)
    mel = tf.matmul(tf.square(tf.abs(spectrum)), tf.constant(bands.T))
    logarithm = tf.math.log1p(10000.0 * mel) / tf.math.log(10.0)
    return tf.signal.frame(logarithm, _PATCH_FRAMES, _PATCH_FRAMES, axis=-2)


def embed(tf: Any, variables: Mapping[str, Any], waveform: Any) -> Any:
    """Embed mono audio at 16 kHz, float32 [..., sample], with variables named as in `SHAPES`.

    Returns
    -------
    float32 [window, 256]
        Output of the last pooling layer, flattened in the order row, column, channel; batch
        normalisation uses the trained moments. The windows of the first waveform come first.
    """
    patches = tf.reshape(log_mel(tf, waveform), [-1, _PATCH_FRAMES, _NUM_MELS])
    # Embed the patches in groups, one after the other, so that memory does not grow with the length
    # of the audio.
    num_groups = -(-tf.shape(patches)[0] // _PATCHES_AT_ONCE)

    def embed_group(group: Any, embeddings: Any) -> tuple[Any, Any]:
        part = patches[group * _PATCHES_AT_ONCE : (group + 1) * _PATCHES_AT_ONCE]
        return group + 1, embeddings.write(group, _embed_patches(tf, variables, part))

    _, embeddings = tf.while_loop(
        lambda group, _: group < num_groups,
        embed_group,
        (0, tf.TensorArray(tf.float32, num_groups, infer_shape=False, element_shape=[None, DIM])),
        parallel_iterations=1,
    )
    return embeddings.concat()


def tag(tf: Any, variables: Mapping[str, Any], waveform: Any) -> Any:
    """Return the likelihoods of `TAGS`, float32 [window, tag], for the audio that `embed` takes."""
    embedding = embed(tf, variables, waveform)
    return tf.sigmoid(tf.matmul(embedding, variables["dense/kernel"]) + variables["dense/bias"])


def _embed_patches(tf: Any, variables: Mapping[str, Any], patches: Any) -> Any:
    # Normalisation 0 has a single channel, that of the input. The others follow the convolutions.
    hidden = _normalise(tf, variables, 0, patches[..., tf.newaxis])
    for layer, (size, stride) in enumerate(_POOLS, start=1):
        kernel, bias = (variables[f"{layer}CNN/{kind}"] for kind in ("kernel", "bias"))
        hidden = tf.nn.relu(tf.nn.conv2d(hidden, kernel, 1, "SAME") + bias)
        hidden = _normalise(tf, variables, layer, hidden)
        hidden = tf.nn.max_pool2d(hidden, size, stride, "VALID")
    return tf.reshape(hidden, [-1, DIM])


def _normalise(tf: Any, variables: Mapping[str, Any], layer: int, hidden: Any) -> Any:
    beta, gamma, mean, variance = (
        variables[f"batch_normalization{f'_{layer}' if layer else ''}/{kind}"]
        for kind in ("beta", "gamma", "moving_mean", "moving_variance")
    )
    return tf.nn.batch_normalization(hidden, mean, variance, beta, gamma, _NORM_EPSILON)
