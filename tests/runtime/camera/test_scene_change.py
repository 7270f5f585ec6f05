"""What counts as a change of scene."""

from __future__ import annotations

import numpy as np

from runtime.camera.scene_change import Stillness, StillnessOptions, block_means, largest_change


def noisy(rng: np.random.Generator, scene: np.ndarray, level: float) -> np.ndarray:
    return np.clip(scene + rng.normal(0, level, scene.shape), 0, 255).astype(np.uint8)


def test_noise_is_learned_and_a_small_thing_is_still_seen() -> None:
    rng = np.random.default_rng(0)
    scene = rng.integers(40, 200, (540, 960, 3))
    still = Stillness(StillnessOptions(learn_s=0.0, refresh_s=100))
    assert still.has_changed(noisy(rng, scene, 6))
    still.has_changed(noisy(rng, scene, 6))
    assert still.threshold is not None
    assert not any(still.has_changed(noisy(rng, scene, 6)) for _ in range(20))
    scene[200:230, 300:330] = 250  # 30 x 30 of 960 x 540 pixels
    assert still.has_changed(noisy(rng, scene, 6))
    assert not still.has_changed(noisy(rng, scene, 6))


def test_a_slow_drift_adds_up() -> None:
    still = Stillness(StillnessOptions(learn_s=0.0, refresh_s=100))
    changed = [still.has_changed(np.full((64, 64, 3), 50 + n // 4, np.uint8)) for n in range(80)]
    assert sum(changed[2:]) >= 4


def test_a_still_scene_is_looked_at_anew_after_a_while() -> None:
    still = Stillness(StillnessOptions(learn_s=0.0, refresh_s=0.0))
    assert all(still.has_changed(np.zeros((64, 64, 3), np.uint8)) for _ in range(4))


def test_another_size_is_another_scene() -> None:
    small, large = np.zeros((64, 64, 3), np.uint8), np.zeros((640, 480, 3), np.uint8)
    assert largest_change(block_means(small), block_means(large)) == float("inf")
    assert block_means(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1)
