"""Options of how cameras are read and how often they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtime.camera.parts import CameraOptions
    from runtime.frames import SourceOptions


@dataclass(frozen=True)
class ViewOptions:
    """When answers are given and of what; the help of each option says what it means."""

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
    rotate: Annotated[int, typer.Option(help="Degrees clockwise: 0, 90, 180 or 270.")] = 0
    crop: Annotated[
        str | None, typer.Option(help="Part of the frame to look at: x,y,width,height in pixels.")
    ] = None
    fps: Annotated[float | None, typer.Option(help="Most frames per second to read.")] = None

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

    def source(self, topic: str | None = None) -> SourceOptions:
        """Return what a source takes.

        Raises:
            OptionError: a rotation, crop or rate that is not possible.
        """
        from runtime.frames import SourceOptions
        from runtime.frames.opening import crop_from_text

        return SourceOptions(
            rotate=self.rotate,  # type: ignore[arg-type]  # checked there
            crop=crop_from_text(self.crop) if self.crop else None,
            fps=self.fps,
            topic=topic,
        )
