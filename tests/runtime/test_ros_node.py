"""The ROS 2 node against a stand-in of rclpy's API; ROS itself is not on PyPI."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import SourceError
from runtime.camera.loop import CameraOptions
from runtime.commands.watch import WatchOptions
from runtime.frames import SourceOptions
from runtime.frames.frame import ReadErrors
from runtime.language.generate import GenerationOptions
from runtime.ros_node import TopicReader, serve

IMAGE = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
OPTIONS = WatchOptions(
    CameraOptions("What is it?", reuse=False),
    SourceOptions(rotate=180),
    GenerationOptions(max_tokens=3),
    answers=3,
)


def image_message(number: int) -> SimpleNamespace:
    stamp = SimpleNamespace(sec=7, nanosec=number)
    return SimpleNamespace(
        header=SimpleNamespace(stamp=stamp),
        height=24,
        width=32,
        encoding="rgb8",
        is_bigendian=0,
        step=96,
        data=IMAGE.tobytes(),
    )


class Ros:
    """What the node does to ROS, and a camera that publishes while the executor spins."""

    def __init__(self) -> None:
        self.subscriptions: dict[str, tuple[type, Callable[[Any], None]]] = {}
        self.published: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.stopped = threading.Event()

    def create_subscription(self, kind: type, topic: str, callback: Any, qos: Any) -> None:
        self.subscriptions[topic] = (kind, callback)

    def create_publisher(self, kind: type, topic: str, qos: Any) -> SimpleNamespace:
        assert topic == "~/answers"
        return SimpleNamespace(publish=lambda text: self.published.append(json.loads(text.data)))

    def destroy_node(self) -> None:
        self.calls.append("destroy_node")

    def spin(self) -> None:
        command = SimpleNamespace(data="ask Is it red?")
        self.subscriptions["~/command"][1](command)
        number = 0
        while not self.stopped.wait(0.01):
            number += 1
            self.subscriptions["/camera"][1](image_message(number))


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ros]:
    world = Ros()

    def module(name: str, **members: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    executor = SimpleNamespace(
        add_node=lambda node: None, spin=world.spin, shutdown=world.stopped.set
    )
    module(
        "rclpy",
        init=lambda **options: world.calls.append(f"init {options}"),
        create_node=lambda name: world,
        shutdown=lambda: world.calls.append("shutdown"),
        executors=module("rclpy.executors", SingleThreadedExecutor=lambda: executor),
        qos=module("rclpy.qos", qos_profile_sensor_data="sensor data"),
        signals=module("rclpy.signals", SignalHandlerOptions=SimpleNamespace(NO="no")),
    )
    messages = module("sensor_msgs.msg", Image="Image", CompressedImage="CompressedImage")
    module("sensor_msgs", msg=messages)
    module("std_msgs")
    module("std_msgs.msg", String=SimpleNamespace)
    yield world
    world.stopped.set()


def test_a_topic_is_answered_and_the_node_is_taken_down(ros: Ros, language_bundle: Bundle) -> None:
    serve(language_bundle.root, "/camera", False, OPTIONS)
    answers, end = ros.published[:-1], ros.published[-1]
    assert len(answers) == end["answers"] == 3
    assert {answer["source"] for answer in answers} == {"/camera"}
    assert all(answer["timestamp_ns"] > 7_000_000_000 for answer in answers)
    assert answers[-1]["question"] == "Is it red?"
    assert ros.subscriptions["/camera"][0] == "Image"
    assert ros.calls == ["init {'signal_handler_options': 'no'}", "destroy_node", "shutdown"]


def test_only_the_newest_message_is_kept() -> None:
    reader = TopicReader("/camera", compressed=False)
    for number in range(5):
        reader.receive(image_message(number))
    captures = reader.captures(ReadErrors("/camera"))
    assert next(captures).timestamp_ns == 7_000_000_004
    threading.Timer(0.05, reader.close).start()
    started_s = time.monotonic()
    assert list(captures) == []
    assert time.monotonic() - started_s < 2


def test_without_ros_it_says_what_to_source(language_bundle: Bundle) -> None:
    with pytest.raises(SourceError, match=r"rclpy is not installed.*setup\.bash"):
        serve(language_bundle.root, "/camera", False, OPTIONS)
