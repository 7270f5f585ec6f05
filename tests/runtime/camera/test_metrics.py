"""Prometheus text and the status line of a loop that ran."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from engines.errors import OptionError
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
