"""Constants that decide bytes: whoever changes one bumps the version beside it, or old artifacts would be reused."""

from __future__ import annotations

from dfmpc.compress import feedback, least_squares, make_calibrator, patches, scale_search, synthetic
from dfmpc.compress.spectral.options import SpectralOptions
from dfmpc.job.calibrators import PRIORS_VERSION
from dfmpc.job.recipes import RECIPES_VERSION
from dfmpc.models.pairs import PAIRING_VERSION


def test_the_constants_of_this_version_of_the_recipes() -> None:
    assert (RECIPES_VERSION, PAIRING_VERSION, PRIORS_VERSION) == (5, 2, 1)
    assert (least_squares.DAMPING, least_squares.ENOUGH) == (0.1, 4)
    assert (patches.SAMPLES, patches.SAMPLES_A_WEIGHT, patches.DEPTHWISE_SAMPLES) == (24_000, 2.5, 6_000)
    assert synthetic.RESIDUAL_SHARE == 0.5
    assert (make_calibrator.SMALL_IMAGES, make_calibrator.LARGE_IMAGES) == (256, 64)
    assert (make_calibrator.WIDEST_BYTES, make_calibrator.FEWEST_IMAGES) == (2**29, 8)
    assert scale_search.CLIPS == 25
    assert feedback.FeedbackOptions() == feedback.FeedbackOptions(
        damp=0.01,
        order="falling",
        clip_search=True,
        sweeps=None,
        starts=(1.1, 1.0, 0.9, 0.8, 0.7),
        coarse_starts=(1.2, 1.1, 1.0, 0.9, 0.8),
        descents=None,
    )
    assert feedback.COARSE == 4
    from_a_model = feedback.FeedbackOptions(starts=(1.0, 0.9, 0.8), coarse_starts=(1.0,), descents=1)
    assert from_a_model == feedback.FROM_A_MODEL
    assert feedback.TOGETHER == 2**23
    assert SpectralOptions() == SpectralOptions(
        side=32, exponent=3.0, colour_correlation=0.93, order=4, reach=2, tau=1.0, contrast=0.1, independence=0.2
    )


def test_damping_grows_where_positions_are_few() -> None:
    assert (
        least_squares.damping(100, None) == least_squares.damping(100, 400) == least_squares.damping(100, 10**6) == 0.1
    )
    assert least_squares.damping(100, 200) == 0.2
