"""Rounds, lineage and erasures as JSON: the same from the API and from the command line. No text that anybody wrote is in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from alignkit_serve.store.erasure import Erasure
from alignkit_serve.store.feedback import Feedback
from alignkit_serve.store.lineage import Exported, OfFeedback, OfPolicy, Reach
from alignkit_serve.store.policies import PolicyVersion
from alignkit_serve.store.rounds import Round


def round_json(made: Round) -> dict[str, Any]:
    """A round."""
    times = {"started_at": made.started_at.isoformat(), "finished_at": made.finished_at.isoformat()}
    return {**asdict(made), "object": "round", "exports": list(made.exports), **times}


def feedback_lineage_json(found: OfFeedback) -> dict[str, Any]:
    """Where feedback went."""
    return {
        "object": "lineage.feedback",
        "feedback": _feedback(found.feedback),
        "history": [_feedback(each) for each in found.history],
        "rows": [asdict(place) for place in found.places],
        **_reach(found.reach),
    }


def policy_lineage_json(found: OfPolicy) -> dict[str, Any]:
    """What a policy is made of."""
    return {
        "object": "lineage.policy",
        "policy": _policy(found.policy),
        "ancestors": [_policy(each) for each in found.ancestors],
        "rounds": [round_json(each) for each in found.rounds],
        "exports": [_export(each) for each in found.exports],
        "feedback": dict(found.feedback),
        "annotators": dict(found.annotators),
        "tainted": [_export(each) for each in found.tainted],
    }


def erasure_json(done: Erasure) -> dict[str, Any]:
    """What an erasure came to. Files of the exports hold what was erased until somebody removes them."""
    return {
        "object": "erasure",
        "id": done.id,
        "requested_at": done.requested_at.isoformat(),
        "done_at": done.done_at.isoformat(),
        "counts": dict(done.counts),
        **_reach(done.reach),
    }


def _reach(reach: Reach) -> dict[str, Any]:
    return {
        "exports": [_export(each) for each in reach.exports],
        "rounds": [round_json(each) for each in reach.rounds],
        "policies": [_policy(each) for each in reach.policies],
    }


def _export(found: Exported) -> dict[str, Any]:
    tainted = found.tainted_at.isoformat() if found.tainted_at else None
    return {**asdict(found), "created_at": found.created_at.isoformat(), "tainted_at": tainted}


def _policy(version: PolicyVersion) -> dict[str, Any]:
    return {"id": version.id, "name": version.name, "parent_id": version.parent_id, "state": version.state}


def _feedback(one: Feedback) -> dict[str, Any]:
    names = ("id", "kind", "target_type", "target_id", "inference_id", "annotator_id", "state", "reason", "supersedes_id")
    return {**{name: getattr(one, name) for name in names}, "received_at": one.received_at.isoformat()}
