"""The labelling page: a prompt with its answers, blind, to rate and rank. Its forms work by themselves; a script adds keys and drafts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import StringConstraints, TypeAdapter, ValidationError
from sqlalchemy import Connection

from alignkit_serve import labelling
from alignkit_serve.auth import Anyone, Caller, Keys, Labeller
from alignkit_serve.desk import Desk
from alignkit_serve.errors import ApiError, invalid
from alignkit_serve.labelling import Sheet
from alignkit_serve.routes.html import PageRoute, answer, form, see
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import labels, sessions
from alignkit_serve.store.labels import Assignment, UnknownAssignment

router = APIRouter(prefix="/label", route_class=PageRoute, include_in_schema=False)

PAGE = "/label"

_REASON: TypeAdapter[str] = TypeAdapter(Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)])

_ROLES = {"system": "Instructions", "user": "Prompt", "assistant": "Assistant", "prompt": "Prompt"}

_FLAGS = {
    "fails_instruction": "Does not do what was asked",
    "inappropriate_for_assistant": "Not how an assistant should answer",
    "hallucination": "Makes things up",
    "breaks_constraint": "Breaks a condition of the prompt",
    "sexual": "Sexual content",
    "violent": "Violent content",
    "encourages_violence": "Encourages violence or self-harm",
    "denigrates_protected_class": "Denigrates a protected group",
    "harmful_advice": "Gives harmful advice",
    "opinion": "States an opinion",
    "moral_judgement": "Passes a moral judgement",
}

_HELP = (
    (("1", "–", "9"), "select an answer"),
    (("j", "k"), "the next, the one before"),
    (("←", "→"), "rate the selected answer"),
    (("Shift", "↑"), "rank it, or move it up"),
    (("Shift", "↓"), "move it down"),
    (("=",), "tie it with the one above"),
    (("Enter",), "submit"),
    (("s",), "skip, with a reason"),
    (("u",), "undo the last one, for ten minutes"),
    (("?",), "show these keys"),
)


@router.get("")
async def task(request: Request, caller: Labeller) -> Response:
    """What the caller is to rank next, or has begun."""
    now = datetime.now(UTC)

    def find(connection: Connection) -> tuple[Assignment, labels.Material] | None:
        given = labels.next_assignment(connection, caller.author, now)
        return (given, labels.material(connection, given)) if given else None

    found = await serving(request).store.awrite(find)
    bar = await _bar(request, caller, now)
    if found is None:
        return answer("nothing.html", keys=False, **bar)
    return _task(*found, labelling.sheet_of(found[0]), [], bar)


@router.get("/login")
async def login(request: Request, allowed: Anyone) -> Response:
    """Where one signs in."""
    return answer("login.html", problem="", hours=_HOURS) if _keys(request).required else see(PAGE)


@router.post("/login")
async def sign_in(request: Request, allowed: Anyone) -> Response:
    """Sign in with a key; one that may only look on goes where that is done."""
    entered = see(PAGE)
    try:
        key = await _keys(request).sign_in(request, entered, dict(await form(request)).get("key", "").strip(), ("label", "admin"))
    except ApiError as error:
        if error.status_code >= 500:
            raise
        return answer("login.html", error.status_code, problem=f"{error.message[0].upper()}{error.message[1:]}.", hours=_HOURS)
    if "label" not in key.scopes:
        entered.headers["Location"] = f"{PAGE}/admin"
    return entered


@router.post("/logout")
async def sign_out(request: Request, caller: Labeller) -> Response:
    """Sign out, at once and for good."""
    left = see("/label/login")
    await _keys(request).sign_out(request, left)
    return left


@router.post("/{id}")
async def submit(request: Request, id: str, caller: Labeller) -> Response:
    """Take what was entered, all of it at once; where something is missing, the page says what and keeps the rest."""
    now = datetime.now(UTC)
    given = await _own(request, id, caller)
    sheet = _kept(request, labelling.sheet_from(await form(request), len(given.slots)))
    if problems := labelling.missing(sheet):
        kept = await _write(request, lambda connection: labels.save_draft(connection, id, caller.author, sheet.model_dump(), now))
        shown = await serving(request).store.aread(lambda connection: labels.material(connection, kept))
        page = _task(kept, shown, sheet, problems, await _bar(request, caller, now))
        page.status_code = 422
        return page
    outcomes = await _write(request, lambda connection: labelling.hand_in(connection, id, caller.author, sheet, now))
    desk: Desk = request.app.state.desk
    for outcome in outcomes:
        desk.count(outcome.feedback.kind, outcome)
    return see(PAGE)


@router.post("/{id}/skip")
async def skip(request: Request, id: str, caller: Labeller) -> Response:
    """Leave it to others."""
    try:
        reason = serving(request).redact(_REASON.validate_python(dict(await form(request)).get("reason", "")))
    except ValidationError as error:
        raise invalid("say in up to 500 characters why it is skipped", "reason") from error
    await _write(request, lambda connection: labelling.set_aside(connection, id, caller.author, reason, datetime.now(UTC)))
    return see(PAGE)


@router.post("/{id}/undo")
async def undo(request: Request, id: str, caller: Labeller) -> Response:
    """Open what was submitted again."""
    await _write(request, lambda connection: labels.reopen(connection, id, caller.author, datetime.now(UTC)))
    return see(PAGE)


@router.put("/{id}/draft")
async def save(request: Request, id: str, body: Sheet, caller: Labeller) -> dict[str, Any]:
    """Keep what was entered so far."""
    given = await _own(request, id, caller)
    if len(body.cards) != len(given.slots):
        raise invalid(f"there are {len(body.cards)} cards; the assignment has {len(given.slots)}", "cards")
    draft = _kept(request, body).model_dump()
    held = await _write(request, lambda connection: labels.save_draft(connection, id, caller.author, draft, datetime.now(UTC)))
    return {"lease_until": held.lease_until.isoformat()}


@router.post("/{id}/heartbeat")
async def heartbeat(request: Request, id: str, caller: Labeller) -> dict[str, Any]:
    """Somebody is still at it."""
    held = await _write(request, lambda connection: labels.heartbeat(connection, id, caller.author, datetime.now(UTC)))
    return {"lease_until": held.lease_until.isoformat()}


_HOURS = int(sessions.LASTS.total_seconds()) // 3600


def _keys(request: Request) -> Keys:
    keys: Keys = request.app.state.keys
    return keys


def _kept(request: Request, sheet: Sheet) -> Sheet:
    """What was entered, as it is stored."""
    return sheet.model_copy(update={"comment": serving(request).redact(sheet.comment)})


async def _own(request: Request, id: str, caller: Caller) -> Assignment:
    try:
        return await serving(request).store.aread(lambda connection: labels.get(connection, id, caller.author))
    except UnknownAssignment as error:
        raise ApiError(404, "not_found", str(error)) from error


async def _write(request: Request, work: Any) -> Any:
    try:
        return await serving(request).store.awrite(work)
    except UnknownAssignment as error:
        raise ApiError(404, "not_found", str(error)) from error


async def _bar(request: Request, caller: Caller, now: datetime) -> dict[str, Any]:
    """What stands above every page."""
    midnight = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0)

    def find(connection: Connection) -> dict[str, Any]:
        done, waiting = labels.progress(connection, caller.author, midnight, now)
        last = labels.undoable(connection, caller.author, now)
        return {"done": done, "waiting": waiting, "undoable": last.id if last else None}

    return {**await serving(request).store.aread(find), "signed_in": caller.key is not None}


def _task(given: Assignment, shown: labels.Material, sheet: Sheet, problems: list[tuple[int, str]], bar: dict[str, Any]) -> Response:
    """Nothing here tells where an answer comes from: neither its id nor its place in the group is on the page."""
    cards = [
        {"letter": labelling.letter(slot), "text": text, **card.model_dump()}
        for slot, (text, card) in enumerate(zip(shown.texts, sheet.cards, strict=True))
    ]
    return answer(
        "label.html",
        id=given.id,
        cards=cards,
        messages=shown.messages,
        roles=_ROLES,
        flags=_FLAGS,
        comment=sheet.comment,
        dwell_ms="" if sheet.dwell_ms is None else sheet.dwell_ms,
        problems=problems,
        again=given.finished_at is not None,
        help=_HELP,
        keys=True,
        **bar,
    )
