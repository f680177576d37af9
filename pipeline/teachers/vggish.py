"""VGGish as TensorFlow operations: log mel front end and network.

Hershey et al. (2017), "CNN architectures for large-scale audio classification", arXiv 1609.09430,
with the front end and the variable names of Google's release (AudioSet, TensorFlow models).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SAMPLE_RATE_HZ = 16000
DIM = 128

_FRAME_SAMPLES, _FRAME_HOP_SAMPLES, _FFT_SIZE = 400, 160, 512
_NUM_MELS, _LOWEST_HZ, _HIGHEST_HZ, _LOG_OFFSET = 64, 125.0, 7500.0, 0.01
_PATCH_FRAMES = 96

_LAYERS = {
    "conv1": (3, 3, 1, 64),
    "conv2": (3, 3, 64, 128),
    "conv3/conv3_1": (3, 3, 128, 256),
    "conv3/conv3_2": (3, 3, 256, 256),
    "conv4/conv4_1": (3, 3, 256, 512),
    "conv4/conv4_2": (3, 3, 512, 512),
    "fc1/fc1_1": (12288, 4096),
    "fc1/fc1_2": (4096, 4096),
    "fc2": (4096, DIM),
}
_POOLED = {"conv1", "conv2", "conv3/conv3_2", "conv4/conv4_2"}

SHAPES: dict[str, tuple[int, ...]] = {
    f"vggish/{layer}/{kind}": shape if kind == "weights" else shape[-1:]
    for layer, shape in _LAYERS.items()
    for kind in ("weights", "biases")
}
"""Shapes of the checkpoint's variables, in the order of the network."""


def log_mel(tf: Any, waveform: Any) -> Any:
    """Compute the patches that the network sees from mono audio at 16 kHz, float32 [..., sample].

    Returns
    -------
    float32 [..., window, 96, 64]
        ``log(mel + 0.01)``: periodic Hann windows of 25 ms every 10 ms, not centred, FFT of 512;
        64 HTK mel bands of the magnitude, 125-7500 Hz; patches of 0.96 s without overlap.
    """
    spectrum = tf.signal.stft(waveform, _FRAME_SAMPLES, _FRAME_HOP_SAMPLES, _FFT_SIZE)
    bands = tf.signal.linear_to_mel_weight_matrix(
        _NUM_MELS, _FFT_SIZE // 2 + 1, SAMPLE_RATE_HZ, _LOWEST_HZ, _HIGHEST_HZ
    )
    mel = tf.matmul(tf.abs(spectrum), bands)
    return tf.signal.frame(tf.math.log(mel + _LOG_OFFSET), _PATCH_FRAMES, _PATCH_FRAMES, axis=-2)


def embed(tf: Any, variables: Mapping[str, Any], waveform: Any) -> Any:
    """Embed mono audio at 16 kHz, float32 [..., sample], with variables named as in `SHAPES`.

    Returns
    -------
    float32 [window, 128]
        Output of the last layer, without an activation. The windows of the first waveform come
        first.
    """
    hidden = tf.reshape(log_mel(tf, waveform), [-1, _PATCH_FRAMES, _NUM_MELS, 1])
    for layer, shape in _LAYERS.items():
        weights, biases = (variables[f"vggish/{layer}/{kind}"] for kind in ("weights", "biases"))
        # Weights with four axes belong to a convolution, those with two to a dense layer.
        if len(shape) == 4:
            hidden = tf.nn.relu(tf.nn.conv2d(hidden, weights, 1, "SAME") + biases)
        else:
            hidden = tf.matmul(tf.reshape(hidden, [-1, math.prod(shape[:-1])]), weights) + biases
            hidden = hidden if layer == "fc2" else tf.nn.relu(hidden)
        if layer in _POOLED:
            hidden = tf.nn.max_pool2d(hidden, 2, 2, "VALID")
    return hidden
