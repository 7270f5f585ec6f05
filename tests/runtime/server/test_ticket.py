"""The time of one request: what ends it is told as what it was."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from runtime.server.refusals import ClientGoneError, RefusalError
from runtime.server.ticket import Ticket


async def silent() -> Any:
    """A client that waits."""
    await asyncio.sleep(3600)


async def leaving() -> Any:
    return {"type": "http.disconnect"}


async def slow() -> int:
    await asyncio.sleep(3600)
    return 1


async def quick() -> int:
    return 7


async def cancelled() -> int:
    """Work that another thread left out, because the ticket was over."""
    raise asyncio.CancelledError


def outcome(
    ticket: Ticket, work: Callable[[], Any], receive: Callable[[], Awaitable[Any]]
) -> object:
    try:
        return asyncio.run(ticket.wait_for(work(), receive))
    except (RefusalError, ClientGoneError) as error:
        return error


def test_work_that_is_done_in_time_is_handed_out() -> None:
    assert outcome(Ticket(60), quick, silent) == 7


@pytest.mark.parametrize("work", [slow, cancelled])
def test_the_deadline_is_told_as_the_deadline(work: Callable[[], Any]) -> None:
    error = outcome(Ticket(0.02), work, silent)
    assert isinstance(error, RefusalError)
    assert (error.status, error.code) == (504, "deadline_exceeded")


def test_the_clients_own_deadline_is_the_clients_error() -> None:
    ticket = Ticket(60)
    ticket.shorten(100)
    ticket.shorten(0.02)
    error = outcome(ticket, slow, silent)
    assert isinstance(error, RefusalError)
    assert (error.status, error.code) == (408, "deadline_exceeded")


def test_a_client_that_left_is_not_refused() -> None:
    ticket = Ticket(60)
    assert isinstance(outcome(ticket, slow, leaving), ClientGoneError)
    assert ticket.over()
    with pytest.raises(ClientGoneError):
        ticket.require_time()
    late = Ticket(0)
    late.give_up()
    with pytest.raises(RefusalError):
        late.require_time()
