"""Options of how often cameras are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtime.camera.parts import CameraOptions


@dataclass(frozen=True)
class ViewOptions:
    """When answers are given; the help of each option says what it means."""

    every: Annotated[
        float, typer.Option(help="Seconds from one answer to the next; 0: as fast as it can.")
    ] = 0.0
    on_change: Annotated[
        bool, typer.Option("--on-change", help="Answer only when the scene has changed.")
    ] = False
    reuse: Annotated[
        bool, typer.Option(help="Keep the tokens and the answer while the scene stands still.")
    ] = True
    refresh: Annotated[
        float, typer.Option(help="Seconds after which a still scene is looked at anew.")
    ] = 10.0

    def camera(self, question: str, every_frame: bool = False) -> CameraOptions:
        """Return what a loop takes.

        Raises:
            OptionError: the question is empty, or a time is not possible.
        """
        from runtime.camera.parts import CameraOptions
        from runtime.camera.scene_change import StillnessOptions

        return CameraOptions(
            question=question,
            every_s=self.every,
            every_frame=every_frame,
            on_change=self.on_change,
            reuse=self.reuse,
            stillness=StillnessOptions(refresh_s=self.refresh),
        )
