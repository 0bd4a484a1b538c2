"""Label tasks: as many people as are needed and nobody twice, whoever comes at once, leaves, comes back, or changes their mind."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, update

from alignkit_serve.store import Store, StoreError, inferences, keys, labels, new_id
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.groups import Group, add_group
from alignkit_serve.store.labels import LEASE, Assignment, NotHeld, Task, UnknownAssignment
from alignkit_serve.store.tables import annotator, assignment, inference, label_task
from tests.serve.store.rows import a_completion, an_inference, stored_policy

NOW = datetime(2026, 5, 4, 9, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def authors(store: Store, count: int) -> list[Author]:
    def create(connection: Any) -> list[Author]:
        return [Author(keys.create(connection, "labeller", ["label"], created_by="test")[0].id) for _ in range(count)]

    return store.write(create).result()


def groups(store: Store, count: int, answers: int = 3) -> list[Group]:
    """Groups of completions of a prompt each, in one transaction."""
    policy = stored_policy(store)

    def make(connection: Any) -> list[Group]:
        made = []
        for number in range(count):
            asked = an_inference(policy, messages=[{"role": "user", "content": f"question {number}"}])
            completions = [a_completion(asked, i, text=f"answer {number}.{i}") for i in range(answers)]
            slots = tuple((one.id, i) for i, one in enumerate(completions))
            made.append(Group(new_id("grp-"), asked.prompt_sha256, "n", None, asked.id, slots))
            inferences.begin(connection, asked)
            inferences.finish(connection, asked.id, completions, status="done", prompt_tokens=1, completion_tokens=1)
            add_group(connection, made[-1])
        return made

    return store.write(make).result()


def add(store: Store, group: Group, **values: Any) -> Task:
    return store.write(lambda connection: labels.add_task(connection, group.id, **{"overlap": 1, **values})).result()


def take(store: Store, author: Author, now: datetime = NOW) -> Assignment | None:
    return store.write(lambda connection: labels.next_assignment(connection, author, now)).result()


def taken(store: Store, author: Author, now: datetime = NOW) -> Assignment:
    found = take(store, author, now)
    assert found is not None
    return found


def submit(store: Store, given: Assignment, author: Author, now: datetime = NOW, draft: Any = None) -> Assignment:
    return store.write(lambda connection: labels.submit(connection, given.id, author, draft, now)).result()


def skip(store: Store, given: Assignment, author: Author, now: datetime = NOW) -> Assignment:
    return store.write(lambda connection: labels.skip(connection, given.id, author, "not my subject", now)).result()


def reopen(store: Store, given: Assignment, author: Author, now: datetime = NOW) -> Assignment:
    return store.write(lambda connection: labels.reopen(connection, given.id, author, now)).result()


def counted(store: Store, state: Any = None) -> list[tuple[str, str, int, int, int]]:
    found, _ = store.read(lambda connection: labels.tasks(connection, state=state))
    return [(one.task.id, one.task.state, one.leased, one.submitted, one.skipped) for one in found]


def test_a_group_has_one_task_and_the_same_again_is_the_same(store: Store) -> None:
    [group] = groups(store, 1)
    gold = [[group.candidates[2][0]], [group.candidates[0][0], group.candidates[1][0]]]
    made = add(store, group, overlap=2, priority=5, gold=gold)
    assert (made.state, made.overlap, made.priority, made.gold) == ("open", 2, 5, tuple(map(tuple, gold)))
    assert add(store, group, overlap=2, priority=5, gold=gold) == made
    assert store.read(lambda connection: labels.get_task(connection, made.id)) == made
    with pytest.raises(StoreError, match=r"has the task .* already, with overlap 2, priority 5 and a gold ranking"):
        add(store, group, overlap=3, priority=5, gold=gold)


def test_what_nobody_can_rank_is_no_task(store: Store) -> None:
    one, two, erased = groups(store, 3, answers=2)
    first, second = (id for id, _ in one.candidates)
    for problem, wrong in (
        ("there is no group 'grp-none'", {"group_id": "grp-none"}),
        ("the overlap is 0", {"overlap": 0}),
        ("must name each of its 2 completions once", {"gold": [[first], [two.candidates[0][0]]]}),
        ("must name each of its 2 completions once", {"gold": [[first, second], [first]]}),
    ):
        values: dict[str, Any] = {"group_id": one.id, "overlap": 1, **wrong}
        with pytest.raises(StoreError, match=problem):
            store.write(lambda connection, values=values: labels.add_task(connection, **values)).result()
    store.write(lambda connection: inferences.delete(connection, erased.inference_id or "")).result()
    with pytest.raises(StoreError, match="not stored any more"):
        add(store, erased)
    [alone] = groups(store, 1, answers=1)
    with pytest.raises(StoreError, match="has 1 completions; allowed: 2 to 9"):
        add(store, alone)
    assert counted(store) == []


def test_the_highest_priority_comes_first_and_of_equals_the_oldest(store: Store) -> None:
    made = [add(store, group, priority=priority) for group, priority in zip(groups(store, 4), (0, 2, 2, 1), strict=True)]
    [author] = authors(store, 1)
    order = []
    while (given := take(store, author)) is not None:
        order.append(given.task_id)
        submit(store, given, author)
    assert order == [made[1].id, made[2].id, made[3].id, made[0].id]


def test_each_assignment_draws_its_own_order_and_shows_it_again(store: Store) -> None:
    [group] = groups(store, 1, answers=9)
    add(store, group, overlap=8)
    people = authors(store, 8)
    given = [taken(store, author) for author in people]
    assert all(sorted(one.slots) == sorted(id for id, _ in group.candidates) for one in given)
    assert len({one.slots for one in given}) == 8  # Two alike: once in thirteen thousand.
    assert [taken(store, author).slots for author in people] == [one.slots for one in given]
    shown = store.read(lambda connection: labels.material(connection, given[0]))
    texts = {id: f"answer 0.{slot}" for id, slot in group.candidates}
    assert (shown.group_id, shown.messages[0]["content"]) == (group.id, "question 0")
    assert shown.texts == tuple(texts[id] for id in given[0].slots)


def test_what_was_begun_is_given_again_until_its_lease_runs_out(store: Store) -> None:
    [group] = groups(store, 1)
    add(store, group)
    first, second = authors(store, 2)
    given = taken(store, first)
    assert given.lease_until == NOW + LEASE
    assert take(store, second, NOW + 9 * MINUTE) is None
    beat = store.write(lambda connection: labels.heartbeat(connection, given.id, first, NOW + 9 * MINUTE)).result()
    assert beat.lease_until == NOW + 9 * MINUTE + LEASE
    assert taken(store, first, NOW + 12 * MINUTE).id == given.id  # looking at it is a sign of life
    assert take(store, second, NOW + 21 * MINUTE) is None
    assert taken(store, second, NOW + 22 * MINUTE).task_id == given.task_id
    with pytest.raises(NotHeld, match="has gone to somebody else"):
        submit(store, given, first, NOW + 23 * MINUTE)
    assert take(store, first, NOW + 23 * MINUTE) is None


def test_what_lapsed_can_be_taken_up_again_with_its_draft(store: Store) -> None:
    for group in groups(store, 2):
        add(store, group)
    [author] = authors(store, 1)
    given = taken(store, author)
    draft = {"comment": "half \x00way", "cards": [1, None]}
    store.write(lambda connection: labels.save_draft(connection, given.id, author, draft, NOW)).result()
    assert store.write(lambda connection: labels.lapse(connection, NOW + LEASE)).result() == 1
    assert store.write(lambda connection: labels.lapse(connection, NOW + LEASE)).result() == 0
    again = taken(store, author, NOW + 60 * MINUTE)
    assert (again.id, again.slots, again.seed) == (given.id, given.slots, given.seed)
    assert again.draft == {"comment": "half \ufffdway", "cards": [1, None]}
    # After a long sleep of the machine nobody has to ask for it again, as long as the place is free.
    store.write(lambda connection: labels.lapse(connection, NOW + 120 * MINUTE)).result()
    assert submit(store, given, author, NOW + 121 * MINUTE).state == "submitted"


def test_a_skipped_task_goes_to_others_and_never_back(store: Store) -> None:
    [group] = groups(store, 1)
    task = add(store, group)
    first, second = authors(store, 2)
    skipped = skip(store, taken(store, first), first)
    assert (skipped.state, skipped.reason, skipped.finished_at) == ("skipped", "not my subject", NOW)
    assert take(store, first) is None
    submit(store, taken(store, second), second)
    assert counted(store) == [(task.id, "done", 0, 1, 1)]
    with pytest.raises(NotHeld, match="this task is skipped already"):
        submit(store, skipped, first)


def test_a_task_is_done_when_as_many_as_it_needs_have_submitted_it(store: Store) -> None:
    [group] = groups(store, 1)
    task = add(store, group, overlap=2)
    first, second, third = authors(store, 3)
    ones, twos = taken(store, first), taken(store, second)
    assert take(store, third) is None
    submit(store, ones, first)
    assert counted(store) == [(task.id, "open", 1, 1, 0)]
    submit(store, twos, second)
    assert counted(store, "done") == [(task.id, "done", 0, 2, 0)]
    assert counted(store, "open") == []


def test_somebody_elses_assignment_is_as_good_as_none(store: Store) -> None:
    [group] = groups(store, 1)
    add(store, group)
    owner, other = authors(store, 2)
    given = taken(store, owner)
    for stranger in (other, Author(None)):
        for work in (
            lambda connection, who: labels.get(connection, given.id, who),
            lambda connection, who: labels.heartbeat(connection, given.id, who, NOW),
            lambda connection, who: labels.save_draft(connection, given.id, who, {}, NOW),
            lambda connection, who: labels.skip(connection, given.id, who, "", NOW),
            lambda connection, who: labels.submit(connection, given.id, who, {}, NOW),
            lambda connection, who: labels.reopen(connection, given.id, who, NOW),
        ):
            with pytest.raises(UnknownAssignment):
                store.write(partial(work, who=stranger)).result()
    assert taken(store, owner).id == given.id


def test_what_was_submitted_can_be_opened_again_for_ten_minutes(store: Store) -> None:
    [group] = groups(store, 1)
    task = add(store, group)
    first, second = authors(store, 2)
    given = submit(store, taken(store, first), first, NOW, {"comment": "good"})
    assert store.read(lambda connection: labels.undoable(connection, first, NOW + 9 * MINUTE)) == given
    assert store.read(lambda connection: labels.undoable(connection, second, NOW + 9 * MINUTE)) is None
    opened = reopen(store, given, first, NOW + 9 * MINUTE)
    assert (opened.state, opened.draft) == ("leased", {"comment": "good"})
    assert counted(store) == [(task.id, "open", 1, 0, 0)]
    assert take(store, second, NOW + 9 * MINUTE) is None  # the place is taken
    assert submit(store, opened, first, NOW + 12 * MINUTE, {"comment": "bad"}).draft == {"comment": "bad"}
    assert counted(store) == [(task.id, "done", 0, 1, 0)]
    assert store.read(lambda connection: labels.undoable(connection, first, NOW + 22 * MINUTE)) is None
    with pytest.raises(NotHeld, match="can be changed for 10 minutes"):
        reopen(store, given, first, NOW + 22 * MINUTE)


def test_what_was_opened_again_and_left_stays_as_it_was_submitted(store: Store) -> None:
    [group] = groups(store, 1)
    task = add(store, group)
    first, second = authors(store, 2)
    reopen(store, submit(store, taken(store, first), first), first)
    assert take(store, second, NOW + LEASE) is None
    assert counted(store) == [(task.id, "done", 0, 1, 0)]


def test_what_was_opened_again_comes_before_what_was_begun_since(store: Store) -> None:
    for group in groups(store, 2):
        add(store, group)
    [author] = authors(store, 1)
    first = submit(store, taken(store, author), author)
    begun = taken(store, author)
    reopen(store, first, author)
    assert taken(store, author).id == first.id
    submit(store, first, author)
    assert taken(store, author).id == begun.id


def test_a_withdrawn_task_goes_to_nobody_and_what_was_said_stays(store: Store) -> None:
    [group] = groups(store, 1)
    task = add(store, group, overlap=3)
    first, second, third = authors(store, 3)
    submit(store, taken(store, first), first)
    given = taken(store, second)
    assert store.write(lambda connection: labels.withdraw(connection, task.id)).result().state == "withdrawn"
    assert counted(store) == [(task.id, "withdrawn", 0, 1, 0)]
    assert take(store, third) is take(store, second) is None
    with pytest.raises(NotHeld, match="this task was withdrawn"):
        submit(store, given, second)
    assert store.read(lambda connection: labels.undoable(connection, first, NOW)) is None
    with pytest.raises(StoreError, match="there is no task 'task-none'"):
        store.write(lambda connection: labels.withdraw(connection, "task-none")).result()


def test_what_cannot_be_read_any_more_is_given_to_nobody(store: Store) -> None:
    erased, expired, kept = groups(store, 3)
    for group in (erased, expired, kept):
        add(store, group, overlap=2)
    first, second = authors(store, 2)
    begun = taken(store, first)
    until = update(inference).where(inference.c.id == expired.inference_id).values(retention_until=NOW)
    store.write(lambda connection: inferences.delete(connection, erased.inference_id or "")).result()
    store.write(lambda connection: connection.execute(until)).result()
    assert store.read(lambda connection: labels.get(connection, begun.id, first)).state == "leased"
    given = [taken(store, who) for who in (first, second)]
    shown = store.read(lambda connection: [labels.material(connection, one) for one in given])
    assert {one.group_id for one in shown} == {kept.id}


def test_whoever_is_blocked_gets_nothing(store: Store) -> None:
    [group] = groups(store, 1)
    add(store, group)
    [author] = authors(store, 1)
    taken(store, author)
    store.write(lambda connection: connection.execute(update(annotator).values(status="blocked"))).result()
    assert take(store, author) is None


def test_progress_is_counted_for_each(store: Store) -> None:
    for group in groups(store, 4):
        add(store, group)
    first, second = authors(store, 2)

    def progress(author: Author, since: datetime) -> tuple[int, int]:
        return store.read(lambda connection: labels.progress(connection, author, since, NOW))

    assert progress(first, NOW) == (0, 4)
    submit(store, taken(store, first), first, NOW - MINUTE)
    submit(store, taken(store, first), first, NOW)
    taken(store, first)
    assert [progress(first, since) for since in (NOW, NOW - MINUTE)] == [(1, 1), (2, 1)]
    assert progress(second, NOW) == (0, 1)


def test_gold_is_one_in_twenty_as_long_as_there_is_any(store: Store) -> None:
    made = groups(store, 200, answers=2)

    def fill(connection: Any) -> None:
        for number, group in enumerate(made):
            labels.add_task(connection, group.id, overlap=1, gold=[[id] for id, _ in group.candidates] if number < 3 else None)

    store.write(fill).result()
    [author] = authors(store, 1)

    def work(connection: Any) -> bool:
        given = labels.next_assignment(connection, author, NOW)
        task = given and labels.get_task(connection, given.task_id)
        assert given is not None
        assert task is not None
        labels.submit(connection, given.id, author, None, NOW)
        assert (task.gold is not None) == (given.seed % 20 == 0)
        return task.gold is not None

    # It may take a while, but not 190 of them: that happens once in twenty thousand.
    assert any(store.write(work).result() for _ in range(190))


def together(count: int, work: Callable[[int], None]) -> None:
    """So many threads that begin at once."""
    ready = threading.Barrier(count)

    def run(number: int) -> None:
        ready.wait(60)
        work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_fifty_who_come_at_once_never_exceed_the_overlap(database_url: str) -> None:
    with Store.open(database_url) as one, Store.open(database_url) as other:
        for group in groups(one, 4):
            add(one, group, overlap=3)
        people = authors(one, 50)
        got: list[tuple[int, Assignment]] = []

        def work(number: int) -> None:
            store = (one, other)[number % 2]
            while (given := take(store, people[number])) is not None:
                got.append((number, given))
                submit(store, given, people[number])

        together(50, work)
        assert Counter(given.task_id for _, given in got) == {task: 3 for task, *_ in counted(one)}
        assert len({(number, given.task_id) for number, given in got}) == len(got) == 12
        assert [row[1:] for row in counted(one)] == [("done", 0, 3, 0)] * 4


def test_one_who_comes_fifty_times_at_once_gets_one(store: Store) -> None:
    for group in groups(store, 3):
        add(store, group)
    [author] = authors(store, 1)
    got: list[str] = []
    together(50, lambda number: got.append(taken(store, author).id))
    assert (len(got), len(set(got))) == (50, 1)


MOVES = st.lists(
    st.tuples(st.sampled_from(["take", "take", "submit", "skip", "lapse", "reopen", "wait", "withdraw"]), st.integers(0, 3)), max_size=40
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES, overlaps=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_whatever_is_done_no_place_is_given_twice(store: Store, moves: list[tuple[str, int]], overlaps: list[int]) -> None:
    def forget(connection: Any) -> None:
        for table in (assignment, label_task):
            connection.execute(delete(table))

    store.write(forget).result()
    made = [add(store, group, overlap=overlap) for group, overlap in zip(groups(store, len(overlaps)), overlaps, strict=True)]
    people = authors(store, 4)
    held: dict[int, Assignment] = {}
    now = NOW
    places = select(label_task.c.id, label_task.c.overlap, label_task.c.state, assignment.c.state.label("which"), assignment.c.annotator_id)
    for move, who in moves:
        now += MINUTE
        try:
            if move == "take" and (given := take(store, people[who], now)):
                held[who] = given
            elif move == "lapse":
                store.write(lambda connection, now=now: labels.lapse(connection, now)).result()
            elif move == "wait":
                now += LEASE
            elif move == "withdraw" and who == 0:
                store.write(lambda connection: labels.withdraw(connection, made[-1].id)).result()
            elif move in ("submit", "skip", "reopen") and who in held:
                {"submit": submit, "skip": skip, "reopen": reopen}[move](store, held[who], people[who], now)
        except NotHeld:
            pass
        found = store.read(lambda connection: connection.execute(places.join(assignment)).all())
        taken_places = Counter(row.id for row in found if row.which in ("leased", "submitted"))
        assert all(taken_places[row.id] <= row.overlap for row in found)
        assert max(Counter((row.id, row.annotator_id) for row in found).values(), default=1) == 1
        submitted = Counter(row.id for row in found if row.which == "submitted")
        assert all((submitted[row.id] == row.overlap) == (row.state == "done") for row in found if row.state != "withdrawn")


def test_a_page_of_tasks_goes_on_after_the_last_one(store: Store) -> None:
    made = [add(store, group) for group in groups(store, 3)]
    assert counted(store, "done") == []
    first, more = store.read(lambda connection: labels.tasks(connection, limit=2))
    rest, none = store.read(lambda connection: labels.tasks(connection, after=first[-1].task.id, limit=2))
    assert [one.task for one in (*first, *rest)] == made
    assert (more, none) == (True, False)
