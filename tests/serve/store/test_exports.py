"""Exports on both databases: only what may be trained on, frozen under a name, and refused when it is no longer what it was."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from sqlalchemy import func, insert, select, update

from alignkit_serve.dataset import RULE_VERSION
from alignkit_serve.dataset.filters import Filters, Shape, Split
from alignkit_serve.exporting import MANIFEST, ROWS, Wanted, obtain
from alignkit_serve.store import Store, StoreError, exports, judged, new_id
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.exports import Export
from alignkit_serve.store.feedback import Feedback, Opinion, retract
from alignkit_serve.store.groups import Group, add_group
from alignkit_serve.store.inferences import Completion, Inference, begin, delete, finish
from alignkit_serve.store.metrics import Metric, define
from alignkit_serve.store.policies import PolicyVersion
from alignkit_serve.store.tables import annotator, audit, export, export_row, feedback, inference, label_task
from tests.serve.store.rows import a_completion, an_inference, stored_policy
from tests.serve.store.test_feedback import ANYONE, a_key, said

LOOSE: dict[str, Any] = {"probation": 0, "annotator_share": 1.0, "key_share": 1.0, "burst": 0}


def asked(store: Store, policy: PolicyVersion, prompt: str, *texts: str, **values: Any) -> tuple[Inference, list[Completion]]:
    """An inference with its answers, which may be trained on unless told otherwise."""
    made = an_inference(policy, messages=[{"role": "user", "content": prompt}], **values)
    answers = [a_completion(made, i, text=text) for i, text in enumerate(texts)]

    def write(connection: Any) -> None:
        begin(connection, made)
        finish(connection, made.id, answers, status="done", prompt_tokens=1, completion_tokens=1)

    store.write(write).result()
    return made, answers


def opine(store: Store, kind: Any, target: str, value: Any, *, on: Any = "completion", author: Author = ANYONE, **values: Any) -> Feedback:
    return said(store, Opinion(author=author, kind=kind, target_type=on, target_id=target, value=value, **values))


def wanted(shape: Shape, name: str = "first", split: Split = "all", **filters: Any) -> Wanted:
    return Wanted(name=name, shape=shape, split=split, filters=Filters(**{**LOOSE, **filters}))


def rows(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in parquet.read_table(path).to_pylist()]


def texts(path: Path) -> list[str]:
    return sorted(row["completion"][0]["content"] for row in rows(path))


def test_an_export_is_a_file_a_manifest_and_rows_of_feedback(store: Store, tmp_path: Path) -> None:
    policy = stored_policy(store)
    inference_, (a, b) = asked(store, policy, "Why?", "Because.", "So.")
    pair = opine(store, "preference", inference_.id, {"a": a.id, "b": b.id, "choice": "a", "strength": 2}, on="inference")
    opine(store, "comment", a.id, "Hm.")
    made, path = obtain(store, wanted("comparisons"), tmp_path)
    (row,) = rows(path)
    assert row == {
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "So."}],
        "margin": 2.0,
        "weight": 1.0,
        "origin": "preference",
        "feedback_ids": [pair.id],
        "policies": [policy.id],
        "inferences": [inference_.id],
    }
    told = json.loads((Path(made.path) / MANIFEST).read_text())
    assert (told["id"], told["sha256"], told["rule_version"], told["rows"]) == (made.id, made.sha256, RULE_VERSION, 1)
    assert told["feedback"] == {"kept": 1, "dropped": {}}
    assert (told["policies"], told["annotators"]) == ({policy.id: 1}, {pair.annotator_id: 1.0})
    assert told["consent"] == judged.CONSENT
    assert "salt" not in {key for key in told if key != "split_salt_sha256"}
    entries = store.read(lambda connection: connection.execute(select(export_row)).all())
    assert entries == [(made.id, 0, pair.id, 1.0)]
    assert store.read(exports.listed) == [made]
    assert store.read(lambda connection: exports.get(connection, made.id)) == made
    assert store.read(lambda connection: exports.get(connection, "exp-x")) is None


def test_later_feedback_changes_no_export_and_goes_into_the_next(store: Store, tmp_path: Path) -> None:
    policy = stored_policy(store)
    _, (a,) = asked(store, policy, "one", "A")
    _, (b,) = asked(store, policy, "two", "B")
    first = opine(store, "thumb", a.id, "up")
    before = obtain(store, wanted("labels"), tmp_path)
    content = before[1].read_bytes()
    opine(store, "thumb", b.id, "down")
    store.write(lambda connection: retract(connection, first.id, ANYONE)).result()
    assert obtain(store, wanted("labels"), tmp_path / "elsewhere") == before
    assert before[1].read_bytes() == content
    _, path = obtain(store, wanted("labels", "second"), tmp_path)
    assert texts(path) == ["B"]


def test_consent_is_a_condition_of_every_export(store: Store, tmp_path: Path) -> None:
    policy = stored_policy(store)
    past, future = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=1)
    made = {
        "kept": asked(store, policy, "kept", "kept", retention_until=future),
        "silent": asked(store, policy, "silent", "silent", consent_train=False),
        "over": asked(store, policy, "over", "over"),
        "erased": asked(store, policy, "erased", "erased"),
        "gold": asked(store, policy, "gold", "gold", "b"),
    }
    for _, answers in made.values():
        opine(store, "thumb", answers[0].id, "up")
        opine(store, "correction", answers[0].id, f"better {answers[0].text}")
    gold, candidates = made["gold"]
    group = Group(new_id("grp-"), gold.prompt_sha256, "label_pool", None, None, tuple((one.id, i) for i, one in enumerate(candidates)))
    task = {
        "id": new_id("task-"),
        "group_id": group.id,
        "priority": 0,
        "overlap": 1,
        "gold": [["x"]],
        "state": "open",
        "created_at": past,
    }

    def change(connection: Any) -> None:
        connection.execute(update(inference).where(inference.c.id == made["over"][0].id).values(retention_until=past))
        delete(connection, made["erased"][0].id)
        add_group(connection, group)
        connection.execute(insert(label_task), task)

    store.write(change).result()
    assert texts(obtain(store, wanted("labels"), tmp_path)[1]) == ["kept"]
    assert texts(obtain(store, wanted("demonstrations"), tmp_path)[1]) == ["better kept"]
    for of in ("judged", "all"):
        (row,) = rows(obtain(store, wanted("prompts", of, of=of), tmp_path)[1])
        assert row["prompt"][0]["content"] == "kept"
    (row,) = rows(obtain(store, wanted("rankings"), tmp_path)[1])
    assert row["responses"] == ["better kept", "kept"]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["thumb", "correction", "ranking", "flag"])), min_size=1, max_size=6))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_is_of_an_inference_without_consent(store: Store, tmp_path: Path, situation: list[tuple[bool, str]]) -> None:
    policy = stored_policy(store)
    for number, (consent, kind) in enumerate(situation):
        made, (a, b) = asked(store, policy, f"{new_id('')} {number}", "A", "B", consent_train=consent)
        value = {"thumb": "up", "correction": "C", "flag": "sexual", "ranking": [[b.id], [a.id]]}[kind]
        ranking = kind == "ranking"
        opine(store, kind, made.id if ranking else a.id, value, on="inference" if ranking else "completion")
    silent = set(
        store.read(lambda connection: connection.scalars(select(inference.c.id).where(inference.c.consent_train.is_(False))).all())
    )
    for shape in ("labels", "rankings", "comparisons", "demonstrations", "prompts"):
        with contextlib.suppress(StoreError):  # there may be no rows
            _, path = obtain(store, wanted(shape, new_id("x"), of="all" if shape == "prompts" else "judged"), tmp_path)
            assert not silent & {id for row in rows(path) for id in row["inferences"]}


def test_a_group_of_several_inferences_is_ranked_without_those_that_may_not_be_used(store: Store, tmp_path: Path) -> None:
    policy = stored_policy(store)
    several = [asked(store, policy, "same", text, consent_train=text != "B") for text in "ABC"]
    a, b, c = (answers[0] for _, answers in several)
    pool = ((a.id, 0), (b.id, 1), (c.id, 2))
    group = Group(new_id("grp-"), several[0][0].prompt_sha256, "label_pool", None, None, pool)
    store.write(lambda connection: add_group(connection, group)).result()
    opine(store, "ranking", group.id, [[c.id], [b.id], [a.id]], on="group")
    opine(store, "demonstration", group.id, "D", on="group")
    (row,) = rows(obtain(store, wanted("rankings"), tmp_path)[1])
    assert (row["responses"], row["ranks"], row["inferences"]) == (["C", "A"], [1, 2], sorted([several[0][0].id, several[2][0].id]))
    assert texts(obtain(store, wanted("demonstrations"), tmp_path)[1]) == ["D"]


def test_filters_by_kind_time_policy_and_split(store: Store, tmp_path: Path) -> None:
    old, new = stored_policy(store, name="old@1"), stored_policy(store, name="new@1")
    _, (a,) = asked(store, old, "one", "A")
    _, (b,) = asked(store, new, "two", "B")
    opine(store, "thumb", a.id, "up")
    opine(store, "rating", b.id, 1)
    at = datetime.now(UTC)
    assert texts(obtain(store, wanted("labels", "thumbs", kinds=("thumb",)), tmp_path)[1]) == ["A"]
    assert texts(obtain(store, wanted("labels", "new", policies=("new@1",)), tmp_path)[1]) == ["B"]
    assert texts(obtain(store, wanted("labels", "id", policies=(new.id,)), tmp_path)[1]) == ["B"]
    assert texts(obtain(store, wanted("labels", "until", until=at.isoformat()), tmp_path)[1]) == ["A", "B"]
    with pytest.raises(StoreError, match="no feedback of a kind that makes such rows"):
        obtain(store, wanted("labels", "since", since=at.isoformat()), tmp_path)
    with pytest.raises(StoreError, match=r"there is no policy 'nwe@1'; registered are: new@1, old@1"):
        obtain(store, wanted("labels", "typo", policies=("nwe@1",)), tmp_path)
    for number in range(40):
        _, (c,) = asked(store, new, f"prompt {number}", "C")
        opine(store, "thumb", c.id, "up")
    train, holdout, both = (
        {row["prompt"][0]["content"] for row in rows(obtain(store, wanted("labels", "split", split), tmp_path)[1])}
        for split in ("train", "holdout", "all")
    )
    assert not train & holdout
    assert train | holdout == both
    assert len(both) == 42


def test_metrics_become_labels(store: Store, tmp_path: Path) -> None:
    toxic = Metric(id=new_id("met-"), name="toxic", type="bool", level="completion", optimize="min")
    store.write(lambda connection: define(connection, toxic)).result()
    _, (a,) = asked(store, stored_policy(store), "one", "A")
    opine(store, "metric", a.id, True, metric=("toxic", None))
    assert rows(obtain(store, wanted("labels"), tmp_path)[1])[0]["label"] is False


def one_export(store: Store, tmp_path: Path) -> tuple[Export, Path, Inference]:
    made, (a,) = asked(store, stored_policy(store), "one", "A")
    opine(store, "thumb", a.id, "up")
    return *obtain(store, wanted("labels"), tmp_path), made


def test_the_same_name_with_other_filters_is_refused_with_what_differs(store: Store, tmp_path: Path) -> None:
    one_export(store, tmp_path)
    message = r"was made with other filters: there probation is 0, not 20, burst is 0, not 60; ask as it was made, or choose another name"
    with pytest.raises(StoreError, match=message):
        obtain(store, wanted("labels", probation=20, burst=60), tmp_path)
    obtain(store, wanted("labels", split="all"), tmp_path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: .*No such file.*bring its file back, or make another one under a new name"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "is not what was written: .*rows.parquet was changed"),
        (lambda path: path.write_bytes(b""), "is not what was written"),
    ],
)
def test_a_file_that_is_missing_or_changed_is_refused(store: Store, tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    _, path, _ = one_export(store, tmp_path)
    harm(path)
    with pytest.raises(StoreError, match=message):
        obtain(store, wanted("labels"), tmp_path)


def test_what_was_erased_since_is_refused(store: Store, tmp_path: Path) -> None:
    _, _, made = one_export(store, tmp_path)
    store.write(lambda connection: delete(connection, made.id)).result()
    with pytest.raises(StoreError, match="erased"):
        obtain(store, wanted("labels"), tmp_path)


def test_a_tainted_export_and_one_with_erased_feedback_are_refused(store: Store, tmp_path: Path) -> None:
    made, _, _ = one_export(store, tmp_path)
    store.write(lambda connection: connection.execute(update(feedback).values(state="erased"))).result()
    with pytest.raises(StoreError, match="holds what was erased since; make another one under a new name"):
        obtain(store, wanted("labels"), tmp_path)
    store.write(lambda connection: connection.execute(update(export).values(tainted_at=datetime(2026, 5, 4, tzinfo=UTC)))).result()
    with pytest.raises(StoreError, match="is tainted since 2026-05-04 00:00: something in it was erased"):
        obtain(store, wanted("labels"), tmp_path)
    assert store.read(lambda connection: exports.find(connection, "first", "labels", "all")) != made


def test_nothing_is_made_of_nothing_and_it_is_said_why(store: Store, tmp_path: Path) -> None:
    _, (a,) = asked(store, stored_policy(store), "one", "A")
    _, (b,) = asked(store, stored_policy(store), "two", "B", consent_train=False)
    opine(store, "thumb", a.id, "up")
    opine(store, "thumb", b.id, "up")
    message = r"would have no rows: of the feedback, 1 probation, 1 of inferences without consent to training \(probation: 0 trusts"
    with pytest.raises(StoreError, match=message):
        obtain(store, wanted("labels", probation=20), tmp_path)
    assert list(tmp_path.rglob("*.parquet")) == []
    assert store.read(exports.listed) == []


def test_two_who_want_the_same_at_once_get_the_same(store: Store, tmp_path: Path) -> None:
    _, (a,) = asked(store, stored_policy(store), "one", "A")
    opine(store, "thumb", a.id, "up")
    found: list[tuple[Export, Path]] = []
    threads = [threading.Thread(target=lambda: found.append(obtain(store, wanted("labels"), tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one == found[0] for one in found] == [True] * 6
    assert [path.name for path in (tmp_path / "first").iterdir()] == [Path(found[0][0].path).name]


def test_a_disk_that_refuses_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    _, (a,) = asked(store, stored_policy(store), "one", "A")
    opine(store, "thumb", a.id, "up")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be written to .*file.*repair this"):
        obtain(store, wanted("labels"), tmp_path / "file")
    assert store.read(exports.listed) == []
    obtain(store, wanted("labels"), tmp_path)


def test_feedback_in_quarantine_is_kept_and_in_no_export(store: Store, tmp_path: Path) -> None:
    _, (a,) = asked(store, stored_policy(store), "one", "A")
    _, (b,) = asked(store, stored_policy(store), "two", "B")
    suspect, fine = opine(store, "thumb", a.id, "up"), opine(store, "thumb", b.id, "up")
    reasons = {suspect.id: "burst", "fb-unknown": "burst"}
    assert store.write(lambda connection: judged.quarantine(connection, reasons, "me")).result() == 1
    assert store.write(lambda connection: judged.quarantine(connection, reasons, "me")).result() == 0
    kept = select(feedback.c.state, feedback.c.reason, feedback.c.value).where(feedback.c.id == suspect.id)
    assert store.read(lambda connection: connection.execute(kept).one()) == ("quarantined", "burst", "up")
    assert texts(obtain(store, wanted("labels"), tmp_path)[1]) == ["B"]
    assert store.write(lambda connection: judged.release(connection, [suspect.id, fine.id], "me")).result() == 1
    assert texts(obtain(store, wanted("labels", "second"), tmp_path)[1]) == ["A", "B"]
    actions = store.read(lambda connection: connection.scalars(select(audit.c.action).order_by(audit.c.seq)).all())
    assert actions == ["feedback.quarantine", "feedback.release"]


def test_annotators_count_as_the_store_says(store: Store, tmp_path: Path) -> None:
    _, (a,) = asked(store, stored_policy(store), "one", "A")
    blocked, heavy = a_key(store), a_key(store)
    first = opine(store, "thumb", a.id, "down", author=blocked)
    second = opine(store, "thumb", a.id, "up", author=heavy)
    change = update(annotator)

    def settle(connection: Any) -> None:
        connection.execute(change.where(annotator.c.id == first.annotator_id).values(status="blocked"))
        connection.execute(change.where(annotator.c.id == second.annotator_id).values(status="active", weight=2.5))

    store.write(settle).result()
    (row,) = rows(obtain(store, wanted("labels", probation=20), tmp_path)[1])
    assert (row["label"], row["feedback_ids"]) == (True, [second.id])


def test_many_rows_are_written_and_found_again(store: Store, tmp_path: Path) -> None:
    policy = stored_policy(store)
    for number in range(30):
        made, answers = asked(store, policy, f"p{number}", *"ABCD")
        opine(store, "ranking", made.id, [[one.id] for one in answers], on="inference")
    made_, path = obtain(store, wanted("comparisons"), tmp_path)
    found = rows(path)
    assert (made_.n_rows, len(found)) == (180, 180)
    count = store.read(lambda connection: connection.scalar(select(func.count()).select_from(export_row)))
    assert count == 180
    prompts = [row["prompt"][0]["content"] for row in found]
    assert [prompts[i] for i in range(0, 180, 6)] == list(dict.fromkeys(prompts))  # the pairs of a ranking lie together
    assert (Path(made_.path) / ROWS) == path
