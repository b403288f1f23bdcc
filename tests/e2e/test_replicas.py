"""The replica that acts is lost while a run trains: another acts within 20 s, nothing is done twice, the run never notices."""

import time
from collections import Counter

import pytest

from dsft_trainer.checkpoint.listing import read_claims
from tests.cluster.node_network import cut_off
from tests.cluster.operator_install import Install
from tests.e2e.breaking import pause
from tests.e2e.conftest import World
from tests.e2e.operator_kill import kill, signal_leader, until_another_leads
from tests.e2e.trial import NAME, STEPS, Lines, Trial, classes, losses

pytestmark = pytest.mark.fault

FAILOVER_SECONDS = 20.0
FROZEN_SECONDS = 60.0
# It trains for longer than all of this takes.
LONG_STEPS = 8 * STEPS


def test_the_leader_is_killed(trial: Trial, reference: Lines, operator: Install, world: World) -> None:
    trial.begin(steps=LONG_STEPS)
    trial.hit()
    took = kill(operator, on_this_machine=world.cluster.disposable)
    assert took < FAILOVER_SECONDS
    finish_undisturbed(trial, reference, f"leader killed: another after {took:.0f} s")


def test_the_leader_is_frozen_for_a_minute(trial: Trial, reference: Lines, operator: Install) -> None:
    trial.begin(steps=LONG_STEPS)
    trial.hit()
    began = time.monotonic()
    leader = signal_leader(operator, "SIGSTOP")
    took = until_another_leads(operator, leader)
    assert took < FAILOVER_SECONDS
    pause(max(0.0, FROZEN_SECONDS - (time.monotonic() - began)))
    signal_leader(operator, "SIGCONT", leader)
    finish_undisturbed(trial, reference, f"leader frozen for 60 s: another after {took:.0f} s")
    assert operator.leader() != leader
    operator.wait_ready()


def test_the_leader_is_cut_off_from_the_api_server(trial: Trial, reference: Lines, operator: Install) -> None:
    trial.begin(steps=LONG_STEPS)
    trial.hit()
    leader = operator.leader()
    with cut_off(operator.address(leader)):
        took = until_another_leads(operator, leader)
        assert took < FAILOVER_SECONDS
        pause(FROZEN_SECONDS - took)
    finish_undisturbed(trial, reference, f"leader cut off for 60 s: another after {took:.0f} s")
    assert operator.leader() != leader
    operator.wait_ready()


def finish_undisturbed(trial: Trial, reference: Lines, fault: str) -> None:
    """One attempt, one start of the ranks, each Event once, each step trained once."""
    status = trial.finish(fault)
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == []
    assert trial.steps_lost() == 0
    assert [str(claim.id) for claim in read_claims(trial.store)] == ["a1.g1"]
    told = Counter(event["reason"] for event in trial.tenant.events(NAME) if not event["reason"].startswith("FailedTo"))
    assert set(told.values()) == {1}, told
    assert all(event.get("count", 1) == 1 for event in trial.tenant.events(NAME))
    trial.assert_same_training(reference)
