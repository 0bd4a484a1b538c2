"""Which work is done by whom, and which rows of the table come of it. Names of rows are stable: others refer to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.bench_work import Work

Metric = Literal["time", "memory", "error"]
Environment = Literal["ours", "ppo", "new"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One worker. ``python``: in whose environment; ``options``: what it is told beside the work; ``variables``: its environment's.

    A lever that is on or off is two sides of alignkit: ``options={"patches": ["module:function"]}`` calls functions before anything is
    built, ``variables`` sets environment variables.
    """

    module: str
    python: Environment
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: ``peer``'s time over ``side``'s, or ``side``'s memory over ``peer``'s. ``peer`` None: a figure by itself."""

    name: str
    precision: str
    metric: Metric = "time"
    side: str = "alignkit"
    peer: str | None = "peer"
    must: float | None = None
    aim: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sides that take turns on the same work. ``fresh``: new processes for each turn, where memory is measured.

    ``checked``: the side whose first step also compares recorded log-probabilities with the training forward's; ``exact``: to 1e-4.
    """

    work: Work
    sides: Mapping[str, Side]
    rows: tuple[Row, ...]
    pairs: int = 3
    fresh: bool = False
    checked: tuple[str, ...] = ()


def ours(task: str, precision: str = "float32", label: str = "alignkit", **options: Any) -> Side:
    """alignkit's worker."""
    options = {"task": task, "precision": precision, **options}
    return Side(module="benchmarks.bench_alignkit", python="ours", label=label, options=options)


def trl_ppo(label: str = "TRL 1.12", **options: Any) -> Side:
    """The last TRL that has a PPO."""
    return Side(module="benchmarks.peers.trl_ppo", python="ppo", label=label, options=options)


def trl(script: str, label: str, **options: Any) -> Side:
    """The newest TRL."""
    return Side(module=f"benchmarks.peers.{script}", python="new", label=label, options=options)


def hf(chunk: int, label: str) -> Side:
    """transformers' generate."""
    return Side(module="benchmarks.peers.hf_generate", python="new", label=label, options={"chunk": chunk})


BF16 = "bf16 compute, fp32 masters; peer fp32"
REAL_PPO: dict[str, Any] = {"batch": 8, "prompt": 64, "response": 64, "epochs": 2, "minibatches": 2}
TINY_PPO: dict[str, Any] = {"batch": 16, "prompt": 64, "response": 64, "epochs": 4, "minibatches": 4, "vocabulary": 2048}


def real_groups(model: str) -> list[Group]:
    """On SmolLM2-135M."""
    ppo = Work(model=model, **REAL_PPO)
    fixed = Work(model=model, batch=16, response=32, lengths="fixed")
    ragged = Work(model=model, batch=64)
    text = Work(model=model, batch=8)
    generating = {"alignkit": ours("generate"), "bf16": ours("generate", "bfloat16", "alignkit bf16")}
    together = Work(model=model, batch=16, response=48, lengths="spread")
    served = {"patches": ["benchmarks.levers:products_of_a_server"]}
    return [
        Group(
            work=ppo, sides={"alignkit": ours("ppo"), "peer": trl_ppo()}, checked=("alignkit",),
            rows=(
                Row(name="ppo_135m_ragged_fp32", precision="fp32", must=2.2, aim=3.0),
                Row(
                    name="ppo_135m_memory", precision="fp32", metric="memory", must=1.0, aim=0.6,
                    note="peak resident memory of either process, which shares nothing with the other",
                ),
            ),
        ),
        Group(
            work=ppo, sides={"alignkit": ours("ppo", "bfloat16"), "peer": trl_ppo()}, checked=("alignkit",),
            rows=(
                Row(
                    name="ppo_135m_ragged_bf16_vs_trl_fp32", precision=BF16, must=3.5, aim=5.0,
                    note="fp32 is all that TRL's bf16 flag gives in its PPO",
                ),
                Row(name="ppo_135m_memory_bf16", precision=BF16, metric="memory"),
            ),
        ),
        Group(
            work=ppo, sides={"alignkit": ours("ppo", "bfloat16"), "peer": trl_ppo("TRL 1.12, bf16 weights", dtype="bfloat16")},
            checked=("alignkit",),
            rows=(
                Row(
                    name="ppo_135m_ragged_bf16_vs_trl_bf16_weights", precision="bf16 compute, fp32 masters; peer bf16 without masters",
                    must=1.2, aim=2.0, note="other mathematics: the peer adds updates to bf16 weights",
                ),
            ),
        ),
        Group(
            work=ppo, sides={"alignkit": ours("ppo", "auto"), "peer": trl_ppo("TRL 1.12, bf16 weights", dtype="bfloat16")},
            checked=("alignkit",),
            rows=(
                Row(
                    name="ppo_135m_ragged_auto_vs_trl_bf16_weights", precision="auto; peer bf16 without masters", aim=2.0, must=1.2,
                    note="what precision: auto chose on this machine, against what makes the peer's weights smallest",
                ),
            ),
        ),
        Group(
            work=fixed, sides={**generating, "peer": hf(16, "HF generate, batches of 16")}, checked=("alignkit", "bf16"),
            rows=(
                Row(name="rollout_135m_fixed_fp32", precision="fp32", must=2.0, aim=2.5),
                Row(name="rollout_logprob_error_fp32", precision="fp32", metric="error", peer=None, must=1e-4, aim=1e-5),
                Row(name="rollout_135m_fixed_bf16", precision="bf16; peer fp32", side="bf16", must=3.0, aim=4.5),
            ),
        ),
        Group(
            work=ragged, sides={**generating, "peer": hf(16, "HF generate, batches of 16")}, checked=("alignkit", "bf16"),
            rows=(
                Row(name="rollout_135m_ragged64_fp32", precision="fp32", must=4.5, aim=7.0),
                Row(name="rollout_135m_ragged64_bf16", precision="bf16; peer fp32", side="bf16"),
            ),
        ),
        Group(
            work=together,
            sides={
                "alignkit": ours("generate", **served), "bf16": ours("generate", "bfloat16", "alignkit bf16", **served),
                "alone": ours("one_by_one", label="alignkit, one by one", **served), "peer": hf(1, "HF generate, one by one"),
            },
            rows=(
                Row(name="concurrent16_135m", precision="fp32", must=6.0, aim=12.0),
                Row(name="concurrent16_135m_bf16", precision="bf16; peer fp32", side="bf16"),
                Row(name="concurrent16_135m_vs_own_one_by_one", precision="fp32", peer="alone"),
            ),
        ),
        Group(
            work=text, sides={"alignkit": ours("sft"), "peer": trl("trl_sft", "TRL, default padding")},
            rows=(Row(name="sft_135m_ragged_fp32", precision="fp32", must=2.4, aim=3.0),),
        ),
        Group(
            work=text, sides={"alignkit": ours("sft", "bfloat16"), "peer": trl("trl_sft", "TRL bf16, default padding", autocast=True)},
            rows=(Row(name="sft_135m_ragged_bf16", precision="bf16 compute, fp32 masters", must=1.7, aim=2.5),),
        ),
        Group(
            work=text, sides={"alignkit": ours("sft", packing=True), "peer": trl("trl_sft", "TRL, packing", packing=True)},
            rows=(Row(name="sft_135m_packing_fp32", precision="fp32", must=1.5, aim=2.0),),
        ),
        reward_group(model, 4, 1, "float32", must=5.0, aim=8.0),
        reward_group(model, 4, 1, "bfloat16", must=2.5, aim=4.0),
        reward_group(model, 2, 6, "float32"),
        reward_group(model, 9, 1, "float32", accumulate=6),
        Group(
            work=Work(model=model, batch=8, prompt=0, response=512), fresh=True,
            sides={
                "alignkit": Side(module="benchmarks.bench_head", python="ours", label="selective_logprobs", options={"head": "selective"}),
                "peer": Side(module="benchmarks.bench_head", python="ours", label="full logits", options={"head": "full"}),
            },
            rows=(
                Row(
                    name="head_loss_memory", precision="fp32", metric="memory", must=0.25, aim=1 / 6,
                    note="head and loss alone, B=8, T=512, V=49152, H=576, forward and backward: peak above the start",
                ),
                Row(name="head_loss_time", precision="fp32"),
            ),
        ),
    ]  # fmt: skip


def reward_group(model: str, k: int, prompts: int, precision: str, *, accumulate: int = 1, **bars: Any) -> Group:
    """The same comparisons: K responses a prompt for alignkit, all pairs of them for TRL."""
    short = "fp32" if precision == "float32" else "bf16"
    note = f"a step is {prompts * k * (k - 1) // 2} pairs: {prompts} prompts of {k} responses"
    if accumulate > 1:
        note += f"; the peer accumulates gradients over {accumulate} microbatches: all pairs at once do not fit into 24 GB beside ours"
    peer = trl("trl_reward", f"TRL {short}", autocast=precision == "bfloat16", accumulate=accumulate)
    size, vocabulary = ("tiny", 2048) if "tiny" in model else ("135m", 49152)
    return Group(
        work=Work(model=model, batch=prompts, k=k, vocabulary=vocabulary),
        sides={"alignkit": ours("reward", precision), "peer": peer},
        rows=(Row(name=f"reward_{size}_k{k}_{short}", precision=short, note=note, **bars),),
    )


def tiny_groups(model: str) -> list[Group]:
    """On a random Llama of a million parameters."""
    sides = {"alignkit": ours("ppo"), "peer": trl_ppo()}
    return [
        Group(
            work=Work(model=model, **TINY_PPO), sides=sides, pairs=5, checked=("alignkit",),
            rows=(Row(name="ppo_tiny_ragged_fp32", precision="fp32", must=1.6, aim=3.0),),
        ),
        Group(
            work=Work(model=model, lengths="fixed", **TINY_PPO), sides=sides, pairs=5, checked=("alignkit",),
            rows=(Row(name="ppo_tiny_fixed_fp32", precision="fp32", must=1.2, aim=2.0),),
        ),
    ]  # fmt: skip


def quick_groups(model: str) -> list[Group]:
    """What ``make bench-quick`` adds for the tiny model."""
    text: dict[str, Any] = {"model": model, "vocabulary": 2048}
    generating = {"alignkit": ours("generate"), "peer": hf(16, "HF generate, batches of 16")}
    return [
        *tiny_groups(model),
        Group(
            work=Work(batch=16, lengths="fixed", **text), sides=generating, pairs=5, checked=("alignkit",),
            rows=(Row(name="rollout_tiny_fixed_fp32", precision="fp32"),),
        ),
        Group(
            work=Work(batch=64, **text), sides=generating, pairs=5, checked=("alignkit",),
            rows=(Row(name="rollout_tiny_ragged64_fp32", precision="fp32"),),
        ),
        Group(
            work=Work(batch=16, **text), sides={"alignkit": ours("sft"), "peer": trl("trl_sft", "TRL, default padding")}, pairs=5,
            rows=(Row(name="sft_tiny_ragged_fp32", precision="fp32"),),
        ),
        reward_group(model, 4, 4, "float32"),
    ]  # fmt: skip


def lever_groups(model: str) -> list[Group]:
    """alignkit against itself, with one lever off: how much of the time each of them saves."""
    text = Work(model=model, batch=8)
    ranked = Work(model=model, batch=1, k=4)
    drawn, many = Work(model=model, batch=16, response=32, lengths="fixed"), Work(model=model, batch=64)
    levers = [
        ("padding_left_out", text, "sft", "computed_padding"),
        ("beginnings_shared_k4", ranked, "reward", "separate_beginnings"),
        ("logits_where_scored", text, "sft", "logits_everywhere"),
        ("logits_kept", text, "sft", "logits_made_twice"),
        ("fused_adamw", text, "sft", "loop_adamw"),
        ("decode_products", drawn, "generate", "plain_weights"),
        ("llama_forward", drawn, "generate", "general_forward"),
        ("rows_leave", many, "generate", "rows_that_stay"),
    ]
    groups = [
        Group(
            work=work,
            sides={
                "alignkit": ours(task),
                "peer": ours(task, label=f"alignkit, {off.replace('_', ' ')}", patches=[f"benchmarks.levers:{off}"]),
            },
            rows=(Row(name=f"lever_{name}", precision="fp32"),),
        )
        for name, work, task, off in levers
    ]
    for name, off in (("decode_products_bf16", "plain_weights"), ("keys_in_float32", "keys_in_bfloat16")):
        without = ours("generate", "bfloat16", f"alignkit, {off.replace('_', ' ')}", patches=[f"benchmarks.levers:{off}"])
        sides = {"alignkit": ours("generate", "bfloat16"), "peer": without}
        groups.append(Group(work=drawn, sides=sides, rows=(Row(name=f"lever_{name}", precision="bf16"),)))
    other = ours("sft", label="alignkit, other linear", patches=["benchmarks.levers:other_linear"])
    others = [
        ("lever_linear", "sft", text, other, "chosen by the probe"),
        ("lever_float32_vs_bfloat16_sft", "sft", text, ours("sft", "bfloat16", "alignkit bf16"), "chosen by the probe"),
        ("lever_float32_vs_bfloat16_rollout", "generate", drawn, ours("generate", "bfloat16", "alignkit bf16"), "chosen by the probe"),
        ("lever_memory_kept", "sft", text, ours("sft", label="alignkit, freed memory given back", memory_kept=False), ""),
        (
            "lever_activations_kept", "sft", text, ours("sft", label="alignkit, activation checkpointing", checkpointing=True),
            "activation_checkpointing is off unless asked for",
        ),
    ]  # fmt: skip
    for name, task, work, off, note in others:
        rows = [Row(name=name, precision="fp32", note=note)]
        if name == "lever_activations_kept":
            rows.append(Row(name="lever_activations_kept_memory", precision="fp32", metric="memory"))
        groups.append(Group(work=work, sides={"alignkit": ours(task), "peer": off}, rows=tuple(rows)))
    one_by_one = ours("ppo", label="alignkit, one model at a time", patches=["benchmarks.levers:one_model_at_a_time"])
    each_time = ours("ppo", label="alignkit, layers each time", top_layers=10, patches=["benchmarks.levers:layers_computed_each_time"])
    read_anew = ours("reward", label="alignkit, nothing kept", top_layers=10, patches=["benchmarks.levers:nothing_kept"])
    ppo, adapted = Work(model=model, **REAL_PPO), "adapters in the uppermost 10 of 30 layers"
    groups += [
        Group(
            work=ppo, sides={"alignkit": ours("ppo"), "peer": one_by_one},
            rows=(
                Row(name="lever_models_beside_each_other", precision="fp32"),
                Row(name="lever_models_beside_each_other_memory", precision="fp32", metric="memory"),
            ),
        ),
        Group(
            work=ppo, sides={"alignkit": ours("ppo", top_layers=10), "peer": each_time},
            rows=(Row(name="lever_frozen_layers_once", precision="fp32", note=adapted),),
        ),
        Group(
            work=replace(ranked, batch=4), sides={"alignkit": ours("reward", top_layers=10), "peer": read_anew},
            rows=(Row(name="lever_frozen_layers_kept", precision="fp32", note=f"{adapted}; of a step of the second epoch and later"),),
        ),
    ]  # fmt: skip
    return groups
