"""A ROS 2 node that subscribes to an image topic and publishes answers.

It subscribes to one topic of `sensor_msgs/Image` or `CompressedImage` and publishes each answer as
JSON in a `std_msgs/String` on `~/answers`. A String on `~/command` controls it (``ask QUESTION``,
``pause``, ``resume``, ``stop``). Only this module imports `rclpy`, which comes with ROS and not
from PyPI. It is tested against a stand-in of rclpy's API, not on a ROS machine.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.cli import run
from engines.errors import SourceError
from runtime.camera.budgets.goal_options import GoalOptions
from runtime.camera.view_options import ViewOptions
from runtime.commands.watch import WatchOptions, watch
from runtime.frames import FrameSource, SourceOptions
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.ros_image import image_from_compressed_message, image_from_message, stamp_ns
from runtime.frames.source import FrameView
from runtime.language.generate import GenerationOptions
from runtime.model_options import ModelOptions, SystemOption

NAME = "foveate"
EXAMPLES = (
    'python -m runtime.ros_node build/pocket /camera/image_raw --ask "Is the way free?"',
    'python -m runtime.ros_node build/pocket /front/compressed --compressed --ask "Who is there?"',
    "ros2 topic pub --once /foveate/command std_msgs/msg/String \"data: 'ask What is ahead?'\"",
)


class TopicReader:
    """The newest message of a topic; `receive` is the subscription's callback."""

    live = True

    def __init__(self, topic: str, compressed: bool) -> None:
        self.name = topic
        self._convert = image_from_compressed_message if compressed else image_from_message
        self._newest: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._closed = threading.Event()

    def receive(self, message: Any) -> None:
        """Take a message in place of one that was not read yet."""
        while True:
            try:
                return self._newest.put_nowait(message)
            except queue.Full:
                try:
                    self._newest.get_nowait()
                except queue.Empty:
                    continue

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield messages as they come, until `close`."""
        while not self._closed.is_set():
            try:
                message = self._newest.get(timeout=0.1)
            except queue.Empty:
                continue
            yield Capture(stamp_ns(message) or time.time_ns(), partial(self._convert, message))

    def close(self) -> None:
        """Stop within a tenth of a second."""
        self._closed.set()


def serve(bundle: Path, topic: str, compressed: bool, options: WatchOptions) -> None:
    """Run the node until a command or signal stops it.

    Args:
        bundle: the bundle's directory.
        topic: the image topic.
        compressed: it carries CompressedImage messages.
        options: how to watch.

    Raises:
        SourceError: rclpy is not there.
        FoveateError: anything else the user can fix.
    """
    rclpy, executors, qos, signals, messages, string = _import_ros()
    # Signals are the camera loop's: ROS's own handler would end the node in the midst of a write.
    rclpy.init(signal_handler_options=signals.SignalHandlerOptions.NO)
    node = rclpy.create_node(NAME)
    reader = TopicReader(topic, compressed)
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    message_type = messages.CompressedImage if compressed else messages.Image
    node.create_subscription(message_type, topic, reader.receive, qos.qos_profile_sensor_data)
    node.create_subscription(string, "~/command", lambda command: commands.put(command.data), 10)
    publisher = node.create_publisher(string, "~/answers", 10)

    def publish(document: dict[str, Any]) -> None:
        publisher.publish(string(data=json.dumps(document, ensure_ascii=False)))

    executor = executors.SingleThreadedExecutor()
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin, name="ros", daemon=True)
    spinning.start()
    try:
        source = FrameSource(reader, options.source)
        watch(bundle, source, options, publish, iter(commands.get, None))
    finally:
        executor.shutdown()
        spinning.join(timeout=2)
        node.destroy_node()
        rclpy.shutdown()


def _import_ros() -> tuple[Any, Any, Any, Any, Any, Any]:
    try:
        import rclpy
        from rclpy import executors, qos, signals
        from sensor_msgs import msg
        from std_msgs.msg import String
    except ImportError as error:
        raise SourceError(
            f"The ROS 2 node needs ROS 2's Python packages, and {error.name} is not installed. Run "
            "`source /opt/ros/<distribution>/setup.bash` first, with the Python that ROS uses."
        ) from error
    return rclpy, executors, qos, signals, msg, String


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    topic: Annotated[str, typer.Argument(help="Image topic, for example /camera/image_raw.")],
    *,
    ask: Annotated[str, typer.Option(help="What to ask about what is seen.")],
    compressed: Annotated[
        bool, typer.Option("--compressed", help="The topic carries CompressedImage messages.")
    ] = False,
    system: SystemOption = None,
    view: ViewOptions,
    frames: FrameView,
    budget: GoalOptions,
    model: ModelOptions,
    generation: GenerationOptions = GenerationOptions(),
) -> None:
    """Answer about an image topic of ROS 2.

    Answers are JSON on ~/answers; send "ask QUESTION", "pause", "resume" or "stop" to ~/command.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    options = WatchOptions(
        camera=view.camera(ask),
        source=SourceOptions(**vars(frames)),
        generation=generation,
        model=model,
        system=system,
        goal=budget.goal(),
    )
    serve(bundle, topic, compressed, options)


if __name__ == "__main__":
    run(main, EXAMPLES)
