"""A reward source that asks a service over HTTP: the declaration. The form of what is sent is in ``wire.py`` and docs/http-reward.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from alignkit.api import Context, RewardSource, RewardSpec, SettingError, hookimpl, setting


@dataclass(frozen=True, kw_only=True)
class HTTPConfig:
    """Where the service is, how it is asked, and how long it is waited for."""

    url: str = setting(doc="where batches of samples are POSTed; http or https, redirects are not followed, proxies are not used")
    key_env: str | None = setting(None, "environment variable that holds the service's key, which is sent as `Authorization: Bearer KEY`")
    batch: int = setting(32, "samples in a request", at_least=1, at_most=4096)
    concurrency: int = setting(4, "requests at a time", at_least=1, at_most=256)
    timeout_seconds: float = setting(30.0, "for one request, until its answer is there whole", above=0.0)
    deadline_seconds: float = setting(600.0, "for a batch, with its retries; then its samples have no score", above=0.0)
    max_failed_share: float = setting(
        0.1,
        "of the last 1000 samples, this share may be left without a score; beyond, the run stops with code 75",
        at_least=0.0,
        below=1.0,
    )
    breaker_failures: int = setting(5, "after this many failed requests in a row the service is left alone", at_least=1)
    cooldown_seconds: float = setting(15.0, "for so long; then one request tries whether it is back", at_least=0.0)

    def __post_init__(self) -> None:
        _check_url(self.url)
        # What is written here is not shown: it may be the key itself.
        if self.key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.key_env):
            raise SettingError("key_env", "is not the name of an environment variable, such as REWARD_KEY; a key never stands in a config")
        for name in ("timeout_seconds", "cooldown_seconds"):
            if getattr(self, name) > self.deadline_seconds:
                raise SettingError(name, f"is {getattr(self, name):g}, longer than deadline_seconds, {self.deadline_seconds:g}; lower it")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise SettingError("url", f"is not an address: {error}") from error
    if parts.username is not None or parts.password is not None:
        raise SettingError("url", "holds a name or a password; put the key into an environment variable and name that with key_env")
    if parts.scheme not in ("http", "https") or not host or parts.fragment or not url.isprintable() or " " in url:
        raise SettingError("url", f'is "{url}"; allowed: http://HOST:PORT/PATH or https://HOST/PATH')


def build(config: HTTPConfig, context: Context) -> RewardSource:
    """The source. Raises ``RunError`` when the key is not in the environment."""
    from alignkit_http_reward.source import HTTPReward, key_of

    return HTTPReward(config, key_of(config.key_env), context.say)


@hookimpl
def register_rewards() -> list[RewardSpec]:
    """Declare ``http``."""
    return [
        RewardSpec(
            kind="http",
            summary="a service that is asked over HTTP; its answers are kept in a journal",
            config=HTTPConfig,
            build=build,
            journal=True,
        )
    ]
