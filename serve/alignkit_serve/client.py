"""The admin API, for the command line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from alignkit.api import AlignkitError


class ServerError(AlignkitError):
    """A server that cannot be reached, or that refuses."""


class BadRequest(ServerError):
    """A request that the server refuses for what is in it; another may be granted."""


class Client:
    """One server, asked with one key."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url, self._headers = url.rstrip("/"), {"Authorization": f"Bearer {key}"} if key else {}

    def policies(self) -> list[dict[str, Any]]:
        """All that it knows."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/admin/policies")["data"]
        return found

    def promote(self, policy: str) -> dict[str, Any]:
        """Promote one that is warm, by its name or id, or load it from a path first."""
        known = next((one for one in self.policies() if policy in (one["id"], one["name"]) and one["state"] in ("warm", "draining")), None)
        if known:
            return self._ask("POST", f"/v1/admin/policies/{known['id']}/promote")
        path = Path(policy)
        return self._ask("POST", "/v1/admin/policies", {"path": str(path.resolve() if path.exists() else path), "promote": True})

    def stage(self, folder: Path) -> dict[str, Any]:
        """Load a policy and put it through its gates; it is warm then, and not live."""
        return self._ask("POST", "/v1/admin/policies", {"path": str(folder.resolve()), "promote": False})

    def rounds(self) -> list[dict[str, Any]]:
        """All that were recorded, the oldest first."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/rounds")["data"]
        return found

    def record_round(self, what: dict[str, Any]) -> dict[str, Any]:
        """Record a round, and promote its policy where ``what`` says so."""
        return self._ask("POST", "/v1/rounds", what)

    def export_ids(self, names: Collection[str]) -> list[str]:
        """The ids of the exports of those names, in all their shapes and splits."""
        return [one["id"] for one in self._ask("GET", "/v1/exports")["data"] if one["name"] in names]

    def agreement(self) -> dict[str, Any]:
        """How far the people who judge agree, by figures that are None where they judged too little, and how far they have come."""
        return self._ask("GET", "/v1/label/agreement")

    def rollback(self) -> dict[str, Any]:
        """Back to the one before."""
        return self._ask("POST", "/v1/admin/rollback")

    def collect_tasks(self, origins: Collection[str], overlap: int, limit: int) -> list[dict[str, Any]]:
        """Make label tasks of what traffic left to be compared; those that were made."""
        body = {"origins": list(origins), "overlap": overlap, "limit": limit}
        made: list[dict[str, Any]] = self._ask("POST", "/v1/label/tasks:collect", body)["data"]
        return made

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with reached(self._url):
            # Loading a policy takes a while, and a proxy has no business between this machine and itself.
            response = httpx.request(method, self._url + path, json=body, headers=self._headers, timeout=600.0, trust_env=False)
        return granted(self._url, response)


@contextmanager
def reached(url: str) -> Iterator[None]:
    """Within, what keeps a server from being reached is a ``ServerError``."""
    try:
        yield
    except httpx.HTTPError as error:
        raise ServerError(f"{url} cannot be reached: {error}; is `alignkit serve` running there? --url names another") from error


def granted(url: str, response: httpx.Response) -> dict[str, Any]:
    """What a server answers. Raises ``ServerError`` where it refuses, ``BadRequest`` where only this one request is at fault."""
    try:
        answer: dict[str, Any] = response.json()
    except ValueError as error:
        raise ServerError(f"{url} answers, but not as an alignkit server does; --url names another") from error
    if response.is_success:
        return answer
    message = answer.get("error", {}).get("message", response.reason_phrase)
    hint = "; make one: alignkit keys create --scopes admin, and put it into ALIGNKIT_API_KEY" if response.status_code == 401 else ""
    kind = BadRequest if response.status_code == 400 else ServerError
    raise kind(f"{url} refuses: {message}{hint}")
