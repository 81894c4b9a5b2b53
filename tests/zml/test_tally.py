"""How far a script has come, read by its agent."""

import os
import sys

from zml.agent.tally import AgentTally, ScriptTally


def test_an_agent_reads_how_far_its_script_had_come_when_the_script_is_dead() -> None:
    agent = AgentTally()
    assert (agent.read(), agent.step()) == ((0, 0), -1)
    script = """
import os
from zml.agent.tally import ScriptTally
tally = ScriptTally()
for epoch, batches, steps in [(0, 1, 0), (0, 2, 1), (7, 4_000_000_000, 2**40)]:
    tally.begin(epoch, batches, steps)
assert "ZML_TALLY" not in os.environ
os.kill(os.getpid(), 9)
"""
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", script],
        {**os.environ, **agent.environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        file_actions=[(os.POSIX_SPAWN_DUP2, agent.file, agent.file)],
    )
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert (agent.read(), agent.step()) == ((7, 4_000_000_000), 2**40)
    agent.close()
    agent.close()
    assert agent.step() == -1


def test_without_an_agent_nobody_reads_it() -> None:
    tally = ScriptTally({})
    tally.begin(0, 1)
    assert tally.memory is None
