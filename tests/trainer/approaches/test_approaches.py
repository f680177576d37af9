"""The ways to inform the latent: hand-worked values, invariances and gradients."""

import math
from dataclasses import replace

import pytest
import torch

from flsep.trainer.approaches.contrastive import contrastive_loss
from flsep.trainer.approaches.distance import distance_loss
from flsep.trainer.approaches.interface import Approach
from flsep.trainer.approaches.registry import build_approach, check_combination
from flsep.trainer.approaches.regularizer import pool_windows
from flsep.trainer.separators.interface import Separation
from flsep.trainer.separators.losses import SeparationLoss
from flsep.trainer.separators.xumx import XUMX
from flsep.trainer.stft import analyse, time_signals
from flsep.trainer.teacher import TeacherWindows

SOURCES = ("drums", "bass", "vocals")
NUM_FRAMES, BATCH, NUM_WINDOWS, EMBEDDING_SIZE = 21, 3, 4, 6
REGULARIZERS = [
    (name, signal) for name in ("contrastive", "distance") for signal in ("mixture", "stems")
]
KINDS = [("none", "mixture"), ("concat", "mixture"), *REGULARIZERS]


def build(name, teacher_signal="mixture", **changes):
    settings = {
        "embedding_size": EMBEDDING_SIZE,
        "latent_size": 16,
        "sources": SOURCES,
        "teacher_signal": teacher_signal,
        "weight": 0.5,
        "temperature": 0.1,
        "projection_size": 5,
    }
    torch.manual_seed(1)
    return build_approach(name, **settings | changes)


def make_windows(teacher_signal="mixture", seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead = (len(SOURCES),) if teacher_signal == "stems" else ()
    first = 5 * torch.arange(NUM_WINDOWS).expand(BATCH, -1)
    return TeacherWindows(
        embeddings=torch.randn(*lead, BATCH, NUM_WINDOWS, EMBEDDING_SIZE, generator=generator),
        activity_db=torch.full((*lead, BATCH, NUM_WINDOWS), -20.0),
        bounds=torch.stack([first, first + 5], -1),
        inside=torch.ones(BATCH, NUM_WINDOWS, dtype=torch.bool),
        held=(torch.arange(NUM_FRAMES) // 5).clamp_max(NUM_WINDOWS - 1).expand(BATCH, -1),
    )


def make_separation(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(SOURCES), NUM_FRAMES, BATCH, 16, generator=generator).tanh()
    latents.requires_grad_()
    return Separation(torch.zeros(0), latents.mean(0), latents)


def quiet(windows, batch, window):
    activity = windows.activity_db.clone()
    activity[..., batch, window] = -60.1
    return replace(windows, activity_db=activity)


def outside(windows, batch, window):
    inside = windows.inside.clone()
    inside[batch, window] = False
    return replace(windows, inside=inside)


def test_pooling_by_hand():
    latent = torch.arange(4.0).reshape(4, 1, 1)
    bounds = torch.tensor([[[0, 2], [1, 4], [-2, 1], [3, 9], [4, 6], [-3, 0]]])
    assert pool_windows(latent, bounds).flatten().tolist() == [0.5, 2.0, 0.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("lead_of_bounds", [False, True])
def test_pooling_equals_a_plain_loop(lead, lead_of_bounds):
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(*lead, 9, 2, 4, generator=generator, dtype=torch.float64)
    latent.requires_grad_()
    shape = (*(lead if lead_of_bounds else ()), 2, 5)
    first = torch.randint(-3, 8, shape, generator=generator)
    length = torch.randint(1, 7, shape, generator=generator)
    bounds = torch.stack([first, first + length], -1)

    def plain(latent):
        pooled = torch.zeros(*lead, 2, 5, 4, dtype=torch.float64)
        for source in range(lead[0] if lead else 1):
            for batch in range(2):
                for window in range(5):
                    own = bounds[source] if lead and lead_of_bounds else bounds
                    begin, end = own[batch, window].clamp(0, 9).tolist()
                    if begin < end:
                        frames = (latent[source] if lead else latent)[begin:end, batch]
                        (pooled[source] if lead else pooled)[batch, window] = frames.mean(0)
        return pooled

    pooled, expected = pool_windows(latent, bounds), plain(latent)
    torch.testing.assert_close(pooled, expected)
    upstream = torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(pooled, latent, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, latent, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


def test_infonce_of_two_windows_by_hand():
    # Cosines: 1 and 0 in the first row, 0.8 (to the wrong one) and 0.6 in the second.
    projected = torch.tensor([[2.0, 0.0], [0.8, 0.6]])
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    loss, accuracy = contrastive_loss(projected, embeddings, temperature=0.5)
    first = math.log(1 + math.exp((0 - 1) / 0.5))
    second = math.log(1 + math.exp((0.8 - 0.6) / 0.5))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert accuracy.item() == 0.5


def test_infonce_of_aligned_and_of_uninformed_windows():
    embeddings = torch.eye(8)
    aligned, accuracy = contrastive_loss(3 * embeddings, embeddings, 0.1)
    assert aligned.item() == pytest.approx(math.log(1 + 7 * math.exp(-10)), abs=1e-6)
    assert accuracy.item() == 1
    uninformed, accuracy = contrastive_loss(torch.ones(8, 8), embeddings, 0.1)
    assert uninformed.item() == pytest.approx(math.log(8), rel=1e-6)
    shifted, accuracy = contrastive_loss(embeddings.roll(1, 0), embeddings, 0.1)
    assert shifted > uninformed
    assert accuracy.item() == 0


def test_windows_with_the_same_embedding_are_not_set_against_each_other():
    distinct = torch.eye(3)
    twins = torch.cat([distinct, 2 * distinct[:1]])
    loss, accuracy = contrastive_loss(twins.clone(), twins, 0.1)
    # Rows 0 and 3 have two candidates beside themselves less the twin, rows 1 and 2 have three.
    expected = (math.log(1 + 2 * math.exp(-10)) + math.log(1 + 3 * math.exp(-10))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert accuracy.item() == 1
    same = torch.ones(4, 3, requires_grad=True)
    loss, _ = contrastive_loss(same * torch.eye(4, 3), torch.ones(4, 3), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert same.grad.abs().max() == 0


def test_near_but_different_embeddings_stay_negatives():
    embeddings = torch.tensor([[1.0, 0.0], [math.cos(0.03), math.sin(0.03)]])  # 1.7 degrees
    loss, _ = contrastive_loss(embeddings, embeddings, 0.1)
    assert loss.item() == pytest.approx(math.log(2), rel=0.01)


def test_distance_by_hand():
    # Cosine distances: 1 between the latents, 1 - 0.6 between the embeddings; both orders count.
    latents = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert distance_loss(latents, embeddings).item() == pytest.approx(0.36, rel=1e-6)
    # A third window opposite to the first: differences 0.6, 0 and 0.6.
    latents = torch.cat([latents, -latents[:1]])
    embeddings = torch.cat([embeddings, -embeddings[:1]])
    assert distance_loss(latents, embeddings).item() == pytest.approx(0.72 / 3, rel=1e-6)


def test_distance_is_zero_for_a_rotated_and_scaled_copy():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(7, 5, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator))
    scales = torch.rand(7, 1, generator=generator) + 0.5
    assert distance_loss(scales * embeddings @ rotation, embeddings).item() < 1e-12
    assert distance_loss(embeddings.roll(1, 0), embeddings).item() > 0.01


@pytest.mark.parametrize("loss", [lambda z, e: contrastive_loss(z, e, 0.1)[0], distance_loss])
def test_silent_latents_have_finite_gradients(loss):
    latents = torch.zeros(3, 4, requires_grad=True)
    value = loss(latents, torch.eye(3, 4))
    value.backward()
    assert value.isfinite()
    assert latents.grad.isfinite().all()


def test_concat_holds_the_projected_embedding():
    approach, windows = build("concat"), make_windows()
    assert approach.condition_size == 5
    condition = approach.condition(windows, NUM_FRAMES)
    assert condition.shape == (NUM_FRAMES, BATCH, 5)
    linear = approach.project[0]
    for frame in range(NUM_FRAMES):
        embedding = windows.embeddings[2, min(frame // 5, NUM_WINDOWS - 1)]
        expected = torch.tanh(linear.weight @ embedding + linear.bias)
        torch.testing.assert_close(condition[frame, 2], expected)
    assert approach.regularizer(make_separation(), windows) == {}
    assert approach.weight == 0


def test_none_gives_nothing():
    approach = build("none", weight=-1.0, temperature=0.0)
    assert type(approach) is Approach
    assert approach.condition_size == 0
    assert approach.weight == 0
    assert approach.condition(make_windows(), NUM_FRAMES) is None
    assert approach.regularizer(make_separation(), make_windows()) == {}
    assert list(approach.parameters()) == []


@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_regularizers_compare_pooled_latents_with_their_embeddings(name, signal):
    approach, windows, separation = build(name, signal), make_windows(signal), make_separation()
    terms = approach.regularizer(separation, windows)
    latents = separation.source_latents_SNBD if signal == "stems" else separation[1][None]
    embeddings = windows.embeddings if signal == "stems" else windows.embeddings[None]
    pairs = [
        (latents[source, 5 * window : 5 * window + 5, batch].mean(0), embedding)
        for source, of_source in enumerate(embeddings)
        for batch, of_batch in enumerate(of_source)
        for window, embedding in enumerate(of_batch)
    ]
    pooled, teacher = (torch.stack(side) for side in zip(*pairs, strict=True))
    assert terms["num_windows"].item() == len(pairs)
    if name == "distance":
        expected = distance_loss(pooled, teacher)
    else:
        projected = approach.criterion.project(pooled)
        expected, accuracy = contrastive_loss(projected, teacher, 0.1)
        assert terms["retrieval_accuracy"] == accuracy
        assert not terms["retrieval_accuracy"].requires_grad
    torch.testing.assert_close(terms["regularizer"], expected)
    assert approach.weight == 0.5
    assert approach.condition_size == 0
    assert approach.condition(windows, NUM_FRAMES) is None


@pytest.mark.parametrize("hide", [quiet, outside])
@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_masked_windows_do_not_count(name, signal, hide):
    approach, separation = build(name, signal), make_separation()
    windows = hide(make_windows(signal), 1, 2)
    before = approach.regularizer(separation, windows)
    changed = windows.embeddings.clone()
    changed[..., 1, 2, :] = torch.nan
    latents = separation.source_latents_SNBD.detach().clone()
    latents[:, 10:15, 1] = 0.7
    after = approach.regularizer(
        Separation(torch.zeros(0), latents.mean(0), latents), replace(windows, embeddings=changed)
    )
    assert before["regularizer"].item() == after["regularizer"].item()
    hidden = len(SOURCES) if signal == "stems" else 1
    every = approach.regularizer(separation, make_windows(signal))
    assert every["num_windows"] - before["num_windows"] == hidden
    assert every["regularizer"] != before["regularizer"]


def test_a_window_at_the_threshold_counts_and_the_threshold_can_be_set():
    separation, windows = make_separation(), make_windows()
    activity = windows.activity_db.clone()
    activity[0] = torch.tensor([-60.0, -60.1, -math.inf, math.nan])
    windows = replace(windows, activity_db=activity)
    count = build("distance").regularizer(separation, windows)["num_windows"]
    assert count == BATCH * NUM_WINDOWS - 3
    louder = build("distance", silence_db=-10.0).regularizer(separation, windows)
    assert louder["num_windows"] == 0


@pytest.mark.parametrize("num_left", [0, 1])
@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_fewer_than_two_windows_give_a_connected_zero(name, signal, num_left):
    approach, separation, windows = build(name, signal), make_separation(), make_windows(signal)
    activity = torch.full_like(windows.activity_db, -math.inf)
    activity.view(-1)[:num_left] = -10.0
    terms = approach.regularizer(separation, replace(windows, activity_db=activity))
    assert terms["num_windows"] == num_left
    assert terms["regularizer"].item() == 0
    terms["regularizer"].backward()
    gradients = [separation.source_latents_SNBD.grad]
    gradients += [parameter.grad for parameter in approach.parameters()]
    assert all(gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_the_order_of_the_batch_does_not_matter(name, signal):
    approach, separation, windows = build(name, signal), make_separation(), make_windows(signal)
    windows = outside(quiet(windows, 1, 2), 0, 3)
    order = torch.tensor([2, 0, 1])
    shuffled = TeacherWindows(
        embeddings=windows.embeddings[..., order, :, :],
        activity_db=windows.activity_db[..., order, :],
        bounds=windows.bounds[order],
        inside=windows.inside[order],
        held=windows.held[order],
    )
    latents = separation.source_latents_SNBD[:, :, order]
    terms = approach.regularizer(separation, windows)
    again = approach.regularizer(Separation(torch.zeros(0), latents.mean(0), latents), shuffled)
    for key, value in terms.items():
        torch.testing.assert_close(again[key], value)


@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_regularizers_are_float32_under_autocast(name, signal):
    approach, separation, windows = build(name, signal), make_separation(), make_windows(signal)
    expected = approach.regularizer(separation, windows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = approach.regularizer(separation, windows)
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert all(torch.equal(terms[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "signal"), KINDS)
def test_gradients_reach_every_parameter_and_training_aligns(name, signal):
    generator = torch.Generator().manual_seed(0)
    approach, windows = build(name, signal, weight=20.0), make_windows(signal)
    references = torch.randn(3, BATCH, 2, 8 * (NUM_FRAMES - 1), generator=generator)
    spectrum, magnitudes = analyse(references.sum(0), 32, 8), analyse(references, 32, 8).abs()
    torch.manual_seed(0)
    separator = XUMX(
        sources=SOURCES,
        num_channels=2,
        n_fft=32,
        max_bin=12,
        hidden_size=8,
        num_layers=2,
        dropout=0.0,
        condition_size=approach.condition_size,
    ).eval()  # in training, batch normalisation takes the input's mean away, and its gradient
    parameters = dict([*separator.named_parameters(), *approach.named_parameters()])
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
    history = []
    for step in range(30):
        condition = approach.condition(windows, NUM_FRAMES)
        separation = separator(spectrum.abs(), condition)
        terms = SeparationLoss()(
            estimates_SNBCF=separation.estimates_SNBCF,
            references_SNBCF=magnitudes,
            estimates_SBCT=time_signals(separation.estimates_SNBCF, spectrum, 8),
            references_SBCT=references,
            mixture_BCT=references.sum(0),
        )
        terms |= approach.regularizer(separation, windows)
        total = terms["total"]
        if "regularizer" in terms:
            total = total + approach.weight * terms["regularizer"]
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            for parameter_name, parameter in parameters.items():
                assert parameter.grad is not None, parameter_name
                assert parameter.grad.isfinite().all(), parameter_name
                assert parameter.grad.any(), parameter_name
        optimizer.step()
        history.append({key: value.item() for key, value in terms.items()})
    assert history[-1]["total"] < history[0]["total"]
    if approach.weight:
        assert history[-1]["regularizer"] < 0.7 * history[0]["regularizer"]


def test_windows_move_together():
    moved = make_windows().to("meta", non_blocking=True)
    tensors = (moved.embeddings, moved.activity_db, moved.bounds, moved.inside, moved.held)
    assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize("mixing", ["original", "random", "rendered"])
@pytest.mark.parametrize("signal", ["mixture", "stems"])
@pytest.mark.parametrize("name", ["none", "concat", "contrastive", "distance"])
def test_possible_combinations(name, mixing, signal):
    possible = name == "none" or (
        signal == "stems" if mixing == "random" else name != "concat" or signal == "mixture"
    )
    if name == "concat" and mixing == "random":
        possible = False
    if possible:
        check_combination(name, mixing, signal)
    else:
        with pytest.raises(ValueError, match="use --"):
            check_combination(name, mixing, signal)


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        (("concat", "original", "stems"), "concat needs the mixture's embedding.*use --teacher-s"),
        (("concat", "random", "stems"), "mixture with --mixing original"),
        (("concat", "random", "mixture"), "use --mixing original, --mixing rendered .* made$"),
        (("distance", "random", "mixture"), "rendered .* made, or --teacher-signal stems"),
        (("contrastive", "random", "mixture"), "contrastive with.*or --teacher-signal stems"),
        (("triplet", "original", "stems"), "unknown approach 'triplet': expected one of none, con"),
        (("none", "shuffled", "stems"), "unknown mixing 'shuffled': expected one of original, ra"),
        (("none", "random", "drums"), "unknown teacher signal 'drums': expected one of mixture"),
    ],
)
def test_impossible_combinations_are_refused_with_reason_and_remedy(combination, message):
    with pytest.raises(ValueError, match=message):
        check_combination(*combination)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("concat", {"teacher_signal": "stems"}, "concat needs the mixture's embedding"),
        ("concat", {"projection_size": 0}, "projection_size is 0"),
        ("contrastive", {"projection_size": 0}, "projection_size is 0"),
        ("contrastive", {"weight": 0.0}, "weight is 0.0: contrastive.*--approach none"),
        ("contrastive", {"temperature": 0.0}, "temperature is 0.0"),
        ("contrastive", {"temperature": math.nan}, "temperature is nan"),
        ("distance", {"weight": -1.0}, "weight is -1.0: distance"),
        ("distance", {"weight": math.inf}, "weight is inf"),
        ("triplet", {}, "unknown approach 'triplet'"),
    ],
)
def test_settings_out_of_range_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


def test_distance_needs_neither_temperature_nor_projection_nor_parameters():
    approach = build("distance", temperature=0.0, projection_size=1)
    assert list(approach.parameters()) == []


def test_windows_that_do_not_fit_are_refused():
    separation = make_separation()
    with pytest.raises(ValueError, match=r"\(3, 4, 6\).*3 stems drums, bass, vocals"):
        build("distance", "stems").regularizer(separation, make_windows())
    with pytest.raises(ValueError, match=r"\(3, 3, 4, 6\).*the mixture's \(batch, window, dim\)"):
        build("distance").regularizer(separation, make_windows("stems"))
    with pytest.raises(ValueError, match=r"\(3, 3, 4, 6\).*the mixture's"):
        build("concat").condition(make_windows("stems"), NUM_FRAMES)
    with pytest.raises(ValueError, match=r"held over \(3, 21\).*expects \(3, 22\)"):
        build("concat").condition(make_windows(), NUM_FRAMES + 1)
