"""The server: an aligned policy behind an OpenAI-compatible API, with the truths that training needs. Declares its parts."""

from __future__ import annotations

from alignkit.api import CommandSpec, DataSpec, EvaluatorSpec, PolicySpec, hookimpl
from alignkit_serve import commands, export_commands, label_commands, provenance_commands
from alignkit_serve.feedback_data import FEEDBACK
from alignkit_serve.gate import GATE
from alignkit_serve.live import LIVE_POLICY


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
        CommandSpec(kind="label", summary="what people are to rank, and how they get on", build=label_commands.label_command),
        CommandSpec(kind="export", summary="what people said, as data", build=export_commands.export_command),
        CommandSpec(kind="quarantine", summary="feedback that no export is to hold", build=export_commands.quarantine_command),
        CommandSpec(kind="rounds", summary="every round, and what became of it", build=provenance_commands.rounds_command),
        CommandSpec(kind="lineage", summary="which policies saw what, and what made them", build=provenance_commands.lineage_command),
        CommandSpec(kind="erase", summary="erase what one person said", build=provenance_commands.erase_command),
    ]


@hookimpl
def register_policies() -> list[PolicySpec]:
    """``live``: where a round begins."""
    return [LIVE_POLICY]


@hookimpl
def register_evaluators() -> list[EvaluatorSpec]:
    """``gate``: where a round ends."""
    return [GATE]


@hookimpl
def register_data_sources() -> list[DataSpec]:
    """``feedback``: what people said of served answers."""
    return [FEEDBACK]
