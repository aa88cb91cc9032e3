"""Changed pictures: what a change may do, that the seed decides it, and that frames of a camera change alike."""

from __future__ import annotations

import numpy as np
import pytest

from blm_jax.data.vision.augment import AugmentConfig, augment, generator
from blm_jax.errors import RequestError


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_no_change_is_no_change() -> None:
    [same] = augment([picture()], AugmentConfig(), generator(0))
    assert np.array_equal(same, picture())


@pytest.mark.parametrize("name", ["crop", "brightness", "contrast", "saturation"])
def test_each_changes_and_keeps_the_size(name: str) -> None:
    [changed] = augment([picture()], AugmentConfig(**{name: 0.3}), generator(0))
    assert changed.shape == (40, 60, 3) and changed.dtype == np.uint8
    assert not np.array_equal(changed, picture())


def test_the_place_decides() -> None:
    config = AugmentConfig(crop=0.2, contrast=0.2)
    seen = [augment([picture()], config, generator(0, epoch, record))[0] for epoch, record in ((0, 1), (0, 1), (0, 2), (1, 1), (10, 1))]
    assert np.array_equal(seen[0], seen[1])
    assert all(not np.array_equal(seen[0], other) for other in seen[2:])


def test_frames_of_a_camera_change_alike() -> None:
    one, other = augment([picture(), picture()], AugmentConfig(crop=0.3, brightness=0.3, saturation=0.3), generator(5))
    assert np.array_equal(one, other)


def test_crops_stay_within_their_share() -> None:
    """Each pixel says where it was: a crop of 0.2 shows four fifths at least, and nothing from outside."""
    ramp = np.repeat(np.linspace(0, 255, 100).astype(np.uint8)[None, :, None], 50, axis=0).repeat(3, axis=2)
    shown = []
    for place in range(50):
        [changed] = augment([ramp], AugmentConfig(crop=0.2), generator(1, place))
        shown.append((int(changed[25, -1, 0]) - int(changed[25, 0, 0])) / 255)
    assert min(shown) > 0.78 and max(shown) <= 1.0 and np.ptp(shown) > 0.1


def test_factors_go_both_ways() -> None:
    gray = np.full((20, 20, 3), 100, np.uint8)
    levels = [augment([gray], AugmentConfig(brightness=0.3), generator(2, place))[0][0, 0, 0] for place in range(60)]
    assert 69 <= min(levels) < 80 and 120 < max(levels) <= 130


def test_settings_out_of_range() -> None:
    with pytest.raises(RequestError, match=r"augment\.crop is 1\.5"):
        AugmentConfig(crop=1.5)
