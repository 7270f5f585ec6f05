"""A camera loop's answers, stalls and summary as JSON objects; ``event`` says which one it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.camera.parts import CameraAnswer, Stall

if TYPE_CHECKING:
    from runtime.camera.budgets.controller import BudgetController
    from runtime.camera.loop import CameraLoop
    from runtime.camera.recording import Recording


def document_from_answer(answer: CameraAnswer) -> dict[str, Any]:
    """Return an answer as the JSON object of its line."""
    encoded, said = answer.encoded, answer.answer
    frame = encoded.queued.frame
    return {
        "event": "answer",
        "answer": said.text,
        "question": answer.question,
        "source": frame.source,
        "frame": encoded.queued.index,
        "timestamp_ns": frame.timestamp_ns,
        "age_ms": round(answer.age_ms, 3),
        "milliseconds": {stage: round(ms, 3) for stage, ms in answer.milliseconds.items()},
        "visual_tokens": int(encoded.visual.valid[0]),
        "prompt_tokens": said.prompt_tokens,
        "answer_tokens": len(said.token_ids),
        "finish": said.finish,
        "reused": answer.reused,
    }


def document_from_stall(stall: Stall) -> dict[str, Any]:
    """Return a stall as the JSON object of its line."""
    return {"event": "stall", "seconds": round(stall.seconds, 1)}


def summary_of(
    loop: CameraLoop,
    answers: int,
    recording: Recording | None,
    controller: BudgetController | None,
) -> dict[str, Any]:
    """Return what became of every frame, as the last JSON line."""
    summary: dict[str, Any] = {
        "event": "end",
        "frames": loop.frames,
        "answers": answers,
        "drops": dict(loop.drops),
        "errors": dict(loop.errors),
    }
    if recording is not None:
        summary |= {"recorded": recording.written, "not_recorded": dict(recording.drops)}
    if controller is not None:
        summary["budget"] = {
            "visual_tokens": controller.tokens,
            "keeps_goal": controller.keeps_goal,
            "decisions": [decision.reason for decision in controller.decisions],
        }
    return summary
