"""The policies by name. Each is an order of the jobs, and terms on which `gang` carries it out.

A plan never gives anybody what somebody else still has: a job that needs what others must leave first has no
allocation yet (it waits, and the room is reserved for it); the round after they have gone gives it.
"""

from __future__ import annotations

from .allocation import terms
from .gang import Terms, carry_out
from .order import RankOf, first_come, in_order, least_served, shortest_left
from .plan import Plan, Policy, View


def fifo(view: View) -> Plan:
    """First come, first served; those behind may use what the first in line cannot."""
    return carry_out(view, in_order(view, first_come))


def las(view: View) -> Plan:
    """Least attained service (Tiresias): nothing needs to be known of a job."""
    return carry_out(view, in_order(view, least_served))


def srtf(view: View) -> Plan:
    """Shortest remaining time first: an oracle, for comparison, unless jobs have honest time limits."""
    return carry_out(view, in_order(view, shortest_left))


def static(view: View) -> Plan:
    """First come, first served, all that was asked for, until it is over: as a queue without preemption does."""
    return carry_out(view, in_order(view, first_come), Terms(preempts=False, backfills=False))


def zml(view: View) -> Plan:
    """Least attained service, and where profiles tell how fast jobs learn, workers where they teach most."""
    order = in_order(view, least_served)
    return carry_out(view, order, terms(view, order))


POLICIES: dict[str, Policy] = {"zml": zml, "fifo": fifo, "srtf": srtf, "las": las, "static": static}
DEFAULT = "zml"

RANKS: dict[str, RankOf] = {
    "zml": least_served,
    "fifo": first_come,
    "srtf": shortest_left,
    "las": least_served,
    "static": first_come,
}
"""What each policy puts jobs in order by. Where each job has a fixed number of workers and no time limit, time changes
a plan by that order alone."""
