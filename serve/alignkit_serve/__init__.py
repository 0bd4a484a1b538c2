"""The server: an aligned policy behind an OpenAI-compatible API, with the truths that training needs. Declares its commands."""

from __future__ import annotations

from alignkit.api import CommandSpec, hookimpl
from alignkit_serve import commands


@hookimpl
def register_commands() -> list[CommandSpec]:
    """``serve`` and what goes with it."""
    return [
        CommandSpec(kind="serve", summary="serve a policy behind an OpenAI-compatible API", build=commands.serve_command),
        CommandSpec(kind="keys", summary="who may ask the server", build=commands.keys_command),
        CommandSpec(kind="policies", summary="the policies that a server knows", build=commands.policies_command),
        CommandSpec(kind="promote", summary="let another policy answer", build=commands.promote_command),
        CommandSpec(kind="rollback", summary="back to the policy before", build=commands.rollback_command),
        CommandSpec(kind="chat", summary="talk to a served policy", build=commands.chat_command),
        CommandSpec(kind="audit", summary="who did what to keys and policies", build=commands.audit_command),
    ]
