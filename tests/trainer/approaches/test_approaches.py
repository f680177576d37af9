"""The ways to inform the latent: hand-worked values, invariances and gradients."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import build_xumx, make_layout

from flsep.trainer.approaches.contrastive import contrastive_loss
from flsep.trainer.approaches.distance import distance_loss
from flsep.trainer.approaches.interface import Sizes, require_possible
from flsep.trainer.approaches.regularizer import pool_windows
from flsep.trainer.config import DataConfig, TrainConfig, configure_approach
from flsep.trainer.errors import ConfigError
from flsep.trainer.registry import APPROACHES, load
from flsep.trainer.separators.xumx import MultiDomainLoss
from flsep.trainer.stft import analyse
from flsep.trainer.teacher import TeacherWindows

SOURCES = ("drums", "bass", "vocals")
NUM_FRAMES, BATCH, NUM_WINDOWS, EMBEDDING_SIZE = 21, 3, 4, 6
REGULARIZERS = [
    (name, signal) for name in ("contrastive", "distance") for signal in ("mixture", "stems")
]
KINDS = [("none", "mixture"), ("concat", "mixture"), *REGULARIZERS]


def build(name, teacher_signal="mixture", **changes):
    settings = {
        "teacher_signal": teacher_signal,
        "weight": 0.5,
        "temperature": 0.1,
        "projection_size": 5,
    }
    kind = load(APPROACHES, name, "approach")
    known = [key for key in settings if hasattr(kind.Config, key)]
    torch.manual_seed(1)
    return kind(
        configure_approach(name, **{key: settings[key] for key in known} | changes),
        Sizes(embedding=EMBEDDING_SIZE, latents={"shared": 16, "sources": 16}, sources=SOURCES),
    )


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


def make_latents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(SOURCES), NUM_FRAMES, BATCH, 16, generator=generator).tanh()
    latents.requires_grad_()
    return with_shared(latents)


def with_shared(latents):
    return {"shared": latents.mean(0), "sources": latents}


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
    assert approach.regularizer(make_latents(), windows) == {}
    assert approach.weight == 0


def test_none_gives_nothing():
    approach = build("none")
    assert approach.condition_size == 0
    assert approach.weight == 0
    assert approach.condition(make_windows(), NUM_FRAMES) is None
    assert approach.regularizer(make_latents(), make_windows()) == {}
    assert list(approach.parameters()) == []


@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_regularizers_compare_pooled_latents_with_their_embeddings(name, signal):
    approach, windows, separation = build(name, signal), make_windows(signal), make_latents()
    terms = approach.regularizer(separation, windows)
    latents = separation["sources"] if signal == "stems" else separation["shared"][None]
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
        projected = approach.project(pooled)
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
    approach, separation = build(name, signal), make_latents()
    windows = hide(make_windows(signal), 1, 2)
    before = approach.regularizer(separation, windows)
    changed = windows.embeddings.clone()
    changed[..., 1, 2, :] = torch.nan
    latents = separation["sources"].detach().clone()
    latents[:, 10:15, 1] = 0.7
    after = approach.regularizer(with_shared(latents), replace(windows, embeddings=changed))
    assert before["regularizer"].item() == after["regularizer"].item()
    hidden = len(SOURCES) if signal == "stems" else 1
    every = approach.regularizer(separation, make_windows(signal))
    assert every["num_windows"] - before["num_windows"] == hidden
    assert every["regularizer"] != before["regularizer"]


def test_a_window_at_the_threshold_counts_and_the_threshold_can_be_set():
    separation, windows = make_latents(), make_windows()
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
    approach, separation, windows = build(name, signal), make_latents(), make_windows(signal)
    activity = torch.full_like(windows.activity_db, -math.inf)
    activity.view(-1)[:num_left] = -10.0
    terms = approach.regularizer(separation, replace(windows, activity_db=activity))
    assert terms["num_windows"] == num_left
    assert terms["regularizer"].item() == 0
    terms["regularizer"].backward()
    gradients = [separation["sources"].grad]
    gradients += [parameter.grad for parameter in approach.parameters()]
    assert all(gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_the_order_of_the_batch_does_not_matter(name, signal):
    approach, separation, windows = build(name, signal), make_latents(), make_windows(signal)
    windows = outside(quiet(windows, 1, 2), 0, 3)
    order = torch.tensor([2, 0, 1])
    shuffled = TeacherWindows(
        embeddings=windows.embeddings[..., order, :, :],
        activity_db=windows.activity_db[..., order, :],
        bounds=windows.bounds[order],
        inside=windows.inside[order],
        held=windows.held[order],
    )
    latents = separation["sources"][:, :, order]
    terms = approach.regularizer(separation, windows)
    again = approach.regularizer(with_shared(latents), shuffled)
    for key, value in terms.items():
        torch.testing.assert_close(again[key], value)


@pytest.mark.parametrize(("name", "signal"), REGULARIZERS)
def test_regularizers_are_float32_under_autocast(name, signal):
    approach, separation, windows = build(name, signal), make_latents(), make_windows(signal)
    expected = approach.regularizer(separation, windows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = approach.regularizer(separation, windows)
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert all(torch.equal(terms[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "signal"), KINDS)
def test_gradients_reach_every_parameter_and_training_aligns(name, signal):
    generator = torch.Generator().manual_seed(0)
    settings = {} if name in ("none", "concat") else {"weight": 20.0}
    approach, windows = build(name, signal, **settings), make_windows(signal)
    references = torch.randn(3, BATCH, 2, 8 * (NUM_FRAMES - 1), generator=generator)
    spectrum = analyse(references.sum(0), 32, 8)
    separator = build_xumx(
        make_layout(n_fft=32),
        hidden_size=8,
        bandwidth_hz=5500.0,
        condition_size=approach.condition_size,
    ).eval()  # in training, batch normalisation takes the input's mean away, and its gradient
    parameters = dict([*separator.named_parameters(), *approach.named_parameters()])
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
    history = []
    for step in range(30):
        condition = approach.condition(windows, NUM_FRAMES)
        separation = separator(spectrum, condition)
        terms = MultiDomainLoss()(
            separation,
            references_SNBCF=analyse(references, 32, 8),
            references_SBCT=references,
            mixture_BCT=references.sum(0),
            hop_samples=8,
        )
        terms |= approach.regularizer(separation.latents, windows)
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


def combine(name, mixing, signal):
    settings = {} if name == "none" else {"teacher_signal": signal}
    return TrainConfig(
        data=DataConfig(mixing=mixing), approach=configure_approach(name, **settings)
    )


@pytest.mark.parametrize("mixing", ["original", "random", "rendered"])
@pytest.mark.parametrize("signal", ["mixture", "stems"])
@pytest.mark.parametrize("name", ["none", "contrastive", "distance"])
def test_possible_combinations(name, mixing, signal):
    if name == "none" or signal == "stems" or mixing != "random":
        needs = require_possible(combine(name, mixing, signal))
        assert needs.teacher_signal == (None if name == "none" else signal)
        assert not needs.teacher_to_separate
        latent = None if name == "none" else {"mixture": "shared", "stems": "sources"}[signal]
        assert needs.latent == latent
    else:
        with pytest.raises(ConfigError, match="use --"):
            require_possible(combine(name, mixing, signal))


def test_concat_needs_the_teacher_to_separate():
    for mixing in ("original", "rendered"):
        needs = require_possible(combine("concat", mixing, "mixture"))
        assert (needs.teacher_signal, needs.teacher_to_separate) == ("mixture", True)
        assert needs.latent is None


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        (("concat", "original", "stems"), "teacher_signal is 'stems'; expected 'mixture': concat"),
        (("concat", "random", "mixture"), "use --mixing original, --mixing rendered .* mixes$"),
        (("distance", "random", "mixture"), "rendered .* mixes, or --teacher-signal stems"),
        (("contrastive", "random", "mixture"), "contrastive needs.*or --teacher-signal stems"),
        (("triplet", "original", "stems"), "unknown approach 'triplet'; expected one of none, con"),
        (("none", "shuffled", "stems"), "data.mixing is 'shuffled'; expected one of original, ra"),
        (("distance", "random", "drums"), "teacher_signal is 'drums'; expected one of mixture"),
    ],
)
def test_impossible_combinations_are_refused_with_reason_and_remedy(combination, message):
    with pytest.raises(ConfigError, match=message):
        require_possible(combine(*combination))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("concat", {"projection_size": 0}, "approach.projection_size is 0"),
        ("contrastive", {"projection_size": 0}, "projection_size is 0"),
        ("contrastive", {"weight": 0.0}, "approach.weight is 0.0; expected > 0.*--approach none"),
        ("contrastive", {"temperature": 0.0}, "temperature is 0.0"),
        ("contrastive", {"temperature": math.nan}, "temperature is nan"),
        ("distance", {"weight": -1.0}, "weight is -1.0"),
        ("distance", {"weight": math.inf}, "weight is inf"),
        ("triplet", {}, "unknown approach 'triplet'"),
    ],
)
def test_settings_out_of_range_are_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **changes)


def test_distance_has_no_parameters():
    approach = build("distance")
    assert list(approach.parameters()) == []


def test_windows_that_do_not_fit_are_refused():
    separation = make_latents()
    with pytest.raises(ValueError, match=r"\(3, 4, 6\).*of 3 stems"):
        build("distance", "stems").regularizer(separation, make_windows())
    with pytest.raises(ValueError, match=r"\(3, 3, 4, 6\).*the mixture's \(batch, window, dim\)"):
        build("distance").regularizer(separation, make_windows("stems"))
    with pytest.raises(ValueError, match=r"\(3, 3, 4, 6\).*the mixture's"):
        build("concat").condition(make_windows("stems"), NUM_FRAMES)
    with pytest.raises(ValueError, match=r"held over \(3, 21\).*expects \(3, 22\)"):
        build("concat").condition(make_windows(), NUM_FRAMES + 1)
