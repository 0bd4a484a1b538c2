"""The admin API, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from alignkit.api import AlignkitError


class ServerError(AlignkitError):
    """A server that cannot be reached, or that refuses."""


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

    def rollback(self) -> dict[str, Any]:
        """Back to the one before."""
        return self._ask("POST", "/v1/admin/rollback")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            # Loading a policy takes a while, and a proxy has no business between this machine and itself.
            response = httpx.request(method, self._url + path, json=body, headers=self._headers, timeout=600.0, trust_env=False)
            answer: dict[str, Any] = response.json()
        except httpx.HTTPError as error:
            raise ServerError(f"{self._url} cannot be reached: {error}; is `alignkit serve` running there? --url names another") from error
        except ValueError as error:
            raise ServerError(f"{self._url} answers, but not as an alignkit server does; --url names another") from error
        if response.is_success:
            return answer
        message = answer.get("error", {}).get("message", response.reason_phrase)
        hint = "; make one: alignkit keys create --scopes admin, and put it into ALIGNKIT_API_KEY" if response.status_code == 401 else ""
        raise ServerError(f"{self._url} refuses: {message}{hint}")
