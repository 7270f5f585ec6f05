"""Prometheus text and the status line of a loop that ran."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request

import pytest

from engines.errors import OptionError
from runtime.camera import metrics_server
from runtime.camera.budgets.controller import BudgetController
from runtime.camera.budgets.goal import FrameCost, Goal
from runtime.camera.loop import CameraLoop, CameraOptions
from runtime.camera.metrics import MetricsServer, StatusLine
from tests.runtime.camera.doubles import ShadeAnswerer, ShadeEncoder, numbered, source_of


def finished_loop() -> tuple[CameraLoop, list]:
    options = CameraOptions("shade?", every_frame=True, reuse=False)
    source = source_of(numbered(6), live=False)
    loop = CameraLoop([source], ShadeEncoder(), ShadeAnswerer(), options)
    return loop, list(loop.answers())


def test_metrics_are_served_on_the_loopback_interface_only() -> None:
    pytest.importorskip("prometheus_client")
    loop, answers = finished_loop()
    loop.drops["superseded"] = 7
    loop.sources[0].errors.count("corrupt packet", "bad bits")
    controller = BudgetController(
        {64: FrameCost(10.0), 128: FrameCost(20.0)}, Goal("latency", 25.0), {64: 0.9, 128: 0.95}
    )
    for _ in range(20):
        controller.observe(controller.tokens, FrameCost(80.0))
    server = MetricsServer(loop, 0, controller)
    try:
        for answer in answers:
            server.observe(answer)
        address = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(address, timeout=5) as reply:
            text = reply.read().decode()
        assert server._server.server_address[0] == "127.0.0.1"
        with pytest.raises(OptionError, match="Choose another with --metrics-port"):
            MetricsServer(loop, port=server.port)
    finally:
        server.close()
    for line in (
        "foveate_frames_total 6.0",
        'foveate_drops_total{reason="superseded"} 7.0',
        'foveate_source_errors_total{reason="corrupt packet"} 1.0',
        'foveate_answers_total{reused="false"} 6.0',
        "foveate_answer_tokens_total 12.0",
        'foveate_frame_age_seconds_bucket{le="+Inf"} 6.0',
        'foveate_stage_seconds_count{stage="prefill"} 6.0',
        "foveate_budget_tokens 64.0",
        "foveate_budget_accuracy 0.9",
        "foveate_budget_keeps_goal 0.0",
        f"foveate_budget_decisions_total {len(controller.decisions)}.0",
    ):
        assert line in text.splitlines()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0  # closed


def test_the_status_line_counts() -> None:
    loop, answers = finished_loop()
    now_s = [0.0]
    line = StatusLine(loop, lambda: now_s[0])
    for answer in answers:
        now_s[0] += 0.5
        line.show(answer)
    assert line.text().startswith("2.0 frames/s | 2.0 answers/s | age ")
    assert line.text().endswith("0 not answered | 0 errors")


def test_idle_and_dripping_connections_are_bounded_and_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr(metrics_server, "LONGEST_S", 0.5)
    loop, _ = finished_loop()
    before = threading.active_count()
    server = MetricsServer(loop, 0)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    try:
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            assert threading.active_count() <= before + 1 + metrics_server.MOST_CONNECTIONS
            with contextlib.suppress(OSError):
                idle[0].sendall(b"X")  # a drop now and then does not keep a connection
            try:
                address = f"http://127.0.0.1:{server.port}/metrics"
                with urllib.request.urlopen(address, timeout=5) as reply:
                    assert b"foveate_frames_total" in reply.read()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail("the idle connections were never cut off")
    finally:
        for each in idle:
            each.close()
        server.close()


def test_a_port_that_is_none_is_told() -> None:
    pytest.importorskip("prometheus_client")
    with pytest.raises(OptionError, match="cannot be served on port 99999"):
        MetricsServer(finished_loop()[0], 99999)
