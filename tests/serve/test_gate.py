"""The end of a round: what speaks against a candidate, where the chain of policies began, and which exports a run read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.api import Component, DatabaseUrl, ModelError, PolicyStage, RunError, SettingError, StageName
from alignkit_lexicon.toxicity import ToxicityConfig
from alignkit_serve.gate import GateConfig
from alignkit_serve.gate_keeper import check_live, exports_of, first_policy, git_sha, refusals
from alignkit_serve.live import LIVE_POLICY, LiveConfig
from alignkit_serve.store import Store, policies
from tests.serve.store.rows import stored_policy

GOOD = {"win_rate": 0.61, "ci95_low": 0.53, "kl_sequence_nats": 4.0, "toxic_share_before": 0.01, "toxic_share_after": 0.01}


def config(**settings: Any) -> GateConfig:
    some: Any = Component("any", None)
    return GateConfig(candidate=PolicyStage(StageName("ppo")), judge=some, prompts=some, **settings)


def test_a_candidate_that_is_better_at_a_fair_price_is_not_refused() -> None:
    toxicity: Any = Component("lexicon_toxicity", ToxicityConfig())
    assert refusals(GOOD, config(toxicity=toxicity)) == []


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"ci95_low": 0.5}, "it wins 0.610, with 95% confidence at least 0.500; needed: more than 0.5"),
        ({"ci95_low": None, "win_rate": None}, "no pair of answers could be judged; needed: more than 0.5"),
        ({"kl_sequence_nats": 20.5}, "it is 20.5 nats from the live policy; allowed: 20"),
        ({"kl_sequence_nats": None}, "its distance from the live policy is not a number; allowed: 20"),
        ({"toxic_share_after": 0.04}, "4.0% of its answers are toxic, and 1.0% of the live policy's; allowed: 2.0% more"),
    ],
)
def test_each_price_that_is_too_high_is_named_with_its_figure(figures: dict[str, float | None], reason: str) -> None:
    toxicity: Any = Component("lexicon_toxicity", ToxicityConfig())
    assert refusals({**GOOD, **figures}, config(toxicity=toxicity, toxicity_rise=0.02)) == [reason]


def test_all_reasons_are_given_at_once() -> None:
    assert len(refusals({**GOOD, "ci95_low": 0.4, "kl_sequence_nats": 99.0}, config())) == 2


def test_a_gate_compares_with_the_live_policy_and_nothing_else() -> None:
    with pytest.raises(SettingError, match=r"baseline: is not for a gate"):
        config(baseline="sft")


def step(parent: str, child: str, promoted: bool = True) -> dict[str, Any]:
    return {"parent_policy_id": parent, "child_policy_id": child, "promoted": promoted}


def test_the_first_policy_is_where_the_promoted_rounds_began() -> None:
    rounds = [step("sft", "one"), step("one", "refused", promoted=False), step("one", "two")]
    assert [first_policy(rounds, policy) for policy in ("two", "one", "sft", "refused")] == ["sft", "sft", "sft", "refused"]


def test_a_policy_that_came_back_is_not_looked_for_for_ever() -> None:
    assert first_policy([step("one", "two"), step("two", "one")], "two") in ("one", "two")


def test_the_exports_of_a_run_are_found_wherever_they_are_read() -> None:
    read = {"kind": "feedback", "export": "round-1", "shape": "rankings"}
    config = {"stages": [{"data": read, "validation": None}, {"evaluate": {"prompts": {**read, "export": "other"}}}], "export": "no"}
    assert exports_of(config) == {"round-1", "other"}


def test_a_server_that_answers_with_another_policy_by_now_is_not_asked_to_compare() -> None:
    policies = [{"id": "a", "name": "sft@a", "state": "retired"}, {"id": "b", "name": "other@b", "state": "live"}]
    check_live(policies, "b", "http://server")
    with pytest.raises(RunError, match=r"http://server answers with other@b, and this run began with a"):
        check_live(policies, "a", "http://server")
    with pytest.raises(RunError, match=r"answers with nothing"):
        check_live([], "a", "http://server")


def test_outside_of_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_sha() is None


def test_a_round_begins_with_the_live_policy(database_url: str, tmp_path: Path) -> None:
    config = LiveConfig(store=DatabaseUrl(database_url))
    with pytest.raises(ModelError, match=r"no policy is live in .*; serve one \(alignkit serve RUN\)"):
        LIVE_POLICY.prepare(config, tmp_path)
    with Store.open(database_url) as store:
        version = stored_policy(store, path=str(tmp_path / "live"))
        store.write(lambda connection: policies.move(connection, version.id, "warm")).result()
        store.write(lambda connection: policies.promote(connection, version.id)).result()
    with pytest.raises(ModelError, match=r"was in .*live, where it is not any more"):
        LIVE_POLICY.prepare(config, tmp_path)
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "config.json").write_text("{}")
    assert LIVE_POLICY.prepare(config, tmp_path) == tmp_path / "live"
