"""Records as the server would make them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from alignkit_serve.store import Store, new_id
from alignkit_serve.store.exports import Export
from alignkit_serve.store.exports import add as add_export
from alignkit_serve.store.inferences import Completion, Inference, begin, finish, prompt_sha256
from alignkit_serve.store.policies import PolicyVersion, register
from alignkit_serve.store.rounds import Round


def a_policy(**values: Any) -> PolicyVersion:
    id = new_id("pol-")
    made = {"name": id, "base_model": "tiny", "path": "runs/a/ppo/policy", "template_sha256": "7e", "created_at": datetime.now(UTC)}
    return PolicyVersion(id=id, **{**made, **values})


def stored_policy(store: Store, **values: Any) -> PolicyVersion:
    version = a_policy(**values)
    store.write(lambda connection: register(connection, version)).result()
    return version


def an_inference(policy: PolicyVersion, **values: Any) -> Inference:
    messages = values.get("messages", [{"role": "user", "content": "Why is the sky blue?"}])
    made = {
        "id": new_id("chatcmpl-"),
        "endpoint": "chat",
        "model": "live",
        "request_id": "req-1",
        "messages": messages,
        "prompt_sha256": prompt_sha256(messages),
        "params": {"temperature": 0.7, "stop": ["\n"]},
        "metadata": {},
        "seed": 17,
        "policy_version_id": policy.id,
        "engine": "torch",
        "consent_train": True,
        "created_at": datetime.now(UTC),
    }
    return Inference(**{**made, **values})


def a_completion(inference: Inference, idx: int = 0, **values: Any) -> Completion:
    made = {
        "id": new_id("cpl-"),
        "inference_id": inference.id,
        "idx": idx,
        "text": "Rayleigh scattering.",
        "token_ids": (5, 70_000, 2),
        "raw_logprobs": (-0.5, -1.25, 0.0),
        "behaviour_logprobs": (-0.25, -1.0, 0.0),
        "finish_reason": "stop",
        "policy_version_id": inference.policy_version_id,
    }
    return Completion(**{**made, **values})


def answered(store: Store, policy: PolicyVersion, **values: Any) -> tuple[Inference, Completion]:
    """An inference that is done, with its one completion."""
    inference = an_inference(policy, **values)
    completion = a_completion(inference)
    store.write(lambda connection: begin(connection, inference)).result()
    done = store.write(
        lambda connection: finish(connection, inference.id, [completion], status="done", prompt_tokens=9, completion_tokens=3)
    )
    done.result()
    return inference, completion


def an_export(store: Store, feedback_ids: Sequence[str] = (), **values: Any) -> Export:
    """An export of one row a piece of feedback."""
    id = new_id("exp-")
    made = {
        "name": id,
        "shape": "rankings",
        "split": "train",
        "rule_version": 1,
        "filters": {},
        "split_salt": "5a",
        "sha256": "ab",
        "n_rows": len(feedback_ids),
        "counts": {},
        "path": f"exports/{id}",
        "created_at": datetime.now(UTC),
    }
    export = Export(id=id, **{**made, **values})
    store.write(lambda connection: add_export(connection, export, [(frozenset({each}), 1.0) for each in feedback_ids])).result()
    return export


def a_round(parent: PolicyVersion, child: PolicyVersion, *exports: Export, **values: Any) -> Round:
    made = {
        "id": new_id("rnd-"),
        "name": "round-1",
        "config_sha256": "c0" * 32,
        "git_sha": None,
        "promoted": True,
        "metrics": {"win_rate": 0.61},
        "started_at": datetime(2026, 5, 4, 9, tzinfo=UTC),
        "finished_at": datetime(2026, 5, 4, 10, tzinfo=UTC),
        "exports": tuple(export.id for export in exports),
    }
    return Round(parent_policy_id=parent.id, child_policy_id=child.id, **{**made, **values})
