"""Rank the sites of a tower by what each costs when it alone is quantized.

Of a large tower, where one frame takes seconds, whole layers are quantized alone, on a few frames,
and then the sites of the costliest layers one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from calibration.agreement.token_metrics import Agreement, Gate
from calibration.frames.dataset import Frames
from calibration.scales.calibration_file import Calibration
from calibration.scales.layers import Site
from calibration.sensitivity.trials import Trials
from engines.progress_bar import Progress
from runtime.vision.preprocess import PixelValues

LARGE = 40
"""Sites beyond which a tower is ranked layer by layer first."""
_RANKED_ALONE = 16
"""Sites of a large tower that are ranked one by one."""
_RANKING_FRAMES = 4
"""Frames that a large tower is ranked on; what is decided is decided on all."""


@dataclass(frozen=True)
class SiteCost:
    """What it costs to quantize one site and nothing else.

    Attributes:
        site: its name; a norm, or a layer that reads its activation alone.
        layers: what is quantized with it.
        weights: how many numbers those layers multiply by, a measure of their time.
        alone: agreement with only these layers in INT8; of a large tower's cheaper layers, with
            the whole layer.
        cost: `Gate.cost` of it; of such a layer the site's share by weights.
    """

    site: str
    layers: tuple[str, ...]
    weights: int
    alone: Agreement
    cost: float


def few_of(frames: Frames) -> list[PixelValues]:
    """Return a few frames, spread evenly, the first and the last among them.

    Where a frame is a view of it all and tiles, both are among them.
    """
    places = set(np.linspace(0, len(frames) - 1, _RANKING_FRAMES).round().astype(int).tolist())
    return [frame for at, frame in enumerate(frames) if at in places]


@dataclass(frozen=True)
class Ranking:
    """Measures what sites cost.

    Attributes:
        trials: on the frames to rank on.
        calibration: what it excludes is left out.
        gate: what a cost is a multiple of.
        progress: called for every trial.
    """

    trials: Trials
    calibration: Calibration
    gate: Gate
    progress: Progress

    def rank(self, sites: Sequence[Site]) -> list[SiteCost]:
        """Return what each site costs, the highest cost per weight first."""
        chosen = {site.name for site in sites}
        costs: list[SiteCost] = []
        if len(sites) > LARGE:
            layers = [list(group) for _, group in groupby(sites, _layer_of)]
            shares = self._sorted(
                cost
                for number, layer in enumerate(layers)
                for cost in self._measure(layer, 0.4 * number / len(layers))
            )
            chosen = {cost.site for cost in shares[:_RANKED_ALONE]}
            costs = shares[_RANKED_ALONE:]
        alone = [site for site in sites if site.name in chosen]
        for number, site in enumerate(alone):
            costs += self._measure([site], 0.4 + 0.4 * number / len(alone))
        return self._sorted(costs)

    def _measure(self, sites: Sequence[Site], done: float) -> list[SiteCost]:
        """Quantize sites together and nothing else; each has its share of the cost by weights."""
        quantized = {
            site.name: tuple(
                layer for layer in site.layers if layer.name not in self.calibration.excluded
            )
            for site in sites
        }
        names = {layer.name for layers in quantized.values() for layer in layers}
        if not names:
            return []
        told = sites[0].name if len(sites) == 1 else f"layer of {sites[0].name}"
        self.progress(f"{told} alone", done)
        alone = self.trials.measure(set(self.calibration.layers) - names)
        weights = {
            site: sum(layer.matrix().size for layer in layers)
            for site, layers in quantized.items()
            if layers
        }
        cost = self.gate.cost(alone)
        return [
            SiteCost(
                site=site,
                layers=tuple(layer.name for layer in quantized[site]),
                weights=count,
                alone=alone,
                cost=cost * count / sum(weights.values()),
            )
            for site, count in weights.items()
        ]

    @staticmethod
    def _sorted(costs: Iterator[SiteCost] | Collection[SiteCost]) -> list[SiteCost]:
        return sorted(costs, key=lambda cost: cost.cost / cost.weights, reverse=True)


def _layer_of(site: Site) -> str:
    """Return the encoder layer that a site is in, such as ``tower.layers.3``."""
    return ".".join(site.name.split(".")[:3])
