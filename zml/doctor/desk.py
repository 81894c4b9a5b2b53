"""The coordinator's part of an examination: of itself it answers, what is for a member it hands on."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import msgspec

from ..messages import Examine, Examined, Probe
from ..transport import PeerLost, Refusal, Refused, TransportError
from .answering import Examinee, allowed
from .findings import COORDINATOR
from .links import probed

if TYPE_CHECKING:
    from ..coordinator.coordinator import Coordinator

HAND_ON_S = 1.0  # for the question's own way


class ExamineDesk:
    """Looking: nothing that is asked here changes anything."""

    def __init__(self, hall: Coordinator) -> None:
        self.hall = hall
        self.examinee = Examinee(hall.endpoint)

    def handle(self, question: Probe | Examine) -> Any | Awaitable[Any]:
        if isinstance(question, Probe):
            return probed(question)
        if question.member == COORDINATOR:
            return self.examinee.answer(question, self.hall.run_dir)
        return self.hand_on(question)

    async def hand_on(self, question: Examine) -> tuple[Examined, bytes]:
        """Ask the member itself. Raises Refusal that says why there is no answer."""
        peer = self.hall.peers.get(question.member)
        if peer is None:
            raise Refusal("member", f"there is no member {question.member}")
        if question.to in self.hall.facts.serving:
            where = self.hall.homes.addresses(question.to)
            question = msgspec.structs.replace(question, addresses=where)
        within_s = allowed(question)
        try:
            answer = await self.hall.endpoint.request(peer, question, timeout_s=within_s + HAND_ON_S)
        except Refused as refused:
            raise Refusal(refused.code, refused.because) from None
        except PeerLost:
            raise Refusal("silent", "it is not connected") from None
        except TransportError:
            raise Refusal("silent", f"no answer within {within_s:g} s") from None
        assert isinstance(answer.message, Examined), answer.message
        return answer.message, bytes(answer.payload or b"")
