"""How far PPO may go: what is kept on the way out, and when the stage is asked to end."""

from pathlib import Path

import pytest

from alignkit.testing import make_context
from alignkit_ppo.leash import Leash


def walk(folder: Path, kls: list[float]) -> tuple[Leash, str | None, int | None]:
    """The leash after these iterations, why it asked to stop, and the iteration whose starting weights were kept last."""
    context = make_context(folder)
    now = 0

    def write(target: Path) -> None:
        (target / "iteration.txt").write_text(str(now))

    leash = Leash(10.0, context, write)
    for now, kl in enumerate(kls, start=1):
        leash.look(now, kl)
    kept = folder / "candidates" / "within-kl-stop" / "iteration.txt"
    return leash, context.guard.stopped, int(kept.read_text()) if kept.exists() else None


def test_three_in_a_row_beyond_the_bound_end_it_and_the_last_within_are_kept(tmp_path: Path) -> None:
    _, stopped, kept = walk(tmp_path, [1.0, 6.0, 9.0, 11.0, 12.0, 13.0])
    assert kept == 3
    assert stopped is not None
    assert "13 nats per response, above kl.stop (10) for 3 iterations" in stopped
    assert "within-kl-stop" in stopped


def test_whoever_goes_on_with_other_settings_has_three_iterations_again(tmp_path: Path) -> None:
    leash, stopped, _ = walk(tmp_path, [11.0, 12.0, 13.0])
    assert stopped is not None
    assert leash.beyond == 0


def test_two_are_forgiven(tmp_path: Path) -> None:
    leash, stopped, kept = walk(tmp_path, [11.0, 12.0, 9.0, 11.0, 12.0])
    assert (leash.beyond, stopped, kept) == (2, None, 3)


def test_far_from_the_bound_nothing_is_written(tmp_path: Path) -> None:
    assert walk(tmp_path, [0.0, 3.0, 5.0])[1:] == (None, None)


def test_a_leap_leaves_nothing_behind_and_says_so(tmp_path: Path) -> None:
    _, stopped, kept = walk(tmp_path, [4.0, 40.0, 50.0, 60.0])
    assert kept is None
    assert "so fast that no weights from near the bound were kept" in str(stopped)


@pytest.mark.parametrize(("kls", "ends"), [([-0.9] * 5, False), ([-1.5, -1.5], False), ([-1.5] * 3, True)])
def test_a_kl_that_is_clearly_negative_is_another_policys(tmp_path: Path, kls: list[float], ends: bool) -> None:
    _, stopped, _ = walk(tmp_path, kls)
    assert (stopped is not None and "what is sampled is not what is scored" in stopped) == ends
