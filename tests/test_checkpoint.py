"""Checkpoints under every accident that a disk, a kill or a hand can cause: never half, never trusted when damaged, never lost silently."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignkit import checkpoint
from alignkit.checkpoint import load_checkpoint, save_artifact, save_checkpoint, verify
from alignkit.errors import CheckpointError, RunError
from alignkit.files import FileHash, sha256, write_json
from alignkit.interfaces import State

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.yaml"


def state(step: int) -> dict[str, State]:
    """A part with tensors and values that tell the step, and a part with values alone."""
    weights = torch.arange(300, dtype=torch.float32) + step
    return {"optimizer": State({"weights": weights}, {"done": step}), "order": State(values={"cursor": 10 * step})}


def saved(folder: Path, *steps: int, keep: int = 3) -> Path:
    for step in steps:
        save_checkpoint(folder, step, state(step), keep)
    return folder / f"step-{steps[-1]:08d}"


def loaded_step(folder: Path, said: list[str] | None = None) -> int:
    """The step that is gone on from, after a look at whether its content is that of the step."""
    found = load_checkpoint(folder, (said if said is not None else []).append)
    assert found is not None
    assert found.states["order"].values == {"cursor": 10 * found.step}
    assert torch.equal(found.states["optimizer"].tensors["weights"], state(found.step)["optimizer"].tensors["weights"])
    return found.step


def holding(name: str, text: str) -> Callable[[Path], None]:
    """What writes an artifact of one file."""

    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_of_every_kind_and_values_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(3, 5),
        "brain": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "counts": torch.tensor([2**62, -1]),
        "bytes": torch.arange(256).to(torch.uint8),
        "mask": torch.tensor([True, False]),
        "strange": torch.tensor([math.nan, math.inf, -0.0]),
        "a/name.with everything": torch.ones(1),
    }
    values = {"float": 0.1 + 0.2, "none": None, "nested": {"list": [1, "ü", "\ud800", True]}, "large": 2**70}
    save_checkpoint(tmp_path, 7, {"optimizer": State(tensors, values), "order": State()}, keep=1)
    found = load_checkpoint(tmp_path, print)
    assert found is not None
    assert found.step == 7
    assert found.states["optimizer"].values == values
    assert found.states["order"] == State({}, {})
    for name, tensor in found.states["optimizer"].tensors.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8)), name
    assert found.states["optimizer"].tensors.keys() == tensors.keys()
    assert names(tmp_path / "step-00000007") == ["manifest.json", "optimizer.safetensors", "state.json"]


def test_tied_sliced_transposed_and_expanded_tensors_are_saved_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "tied": base, "row": base[1], "turned": base.t(), "wide": torch.ones(1, 1).expand(2, 3)}
    tensors["learnt"] = torch.nn.Parameter(torch.ones(2))
    save_checkpoint(tmp_path, 1, {"part": State(tensors)}, keep=1)
    found = load_checkpoint(tmp_path, print)
    assert found is not None
    assert all(torch.equal(found.states["part"].tensors[name], tensor) for name, tensor in tensors.items())


def test_only_the_newest_are_kept_and_newest_goes_by_number(tmp_path: Path) -> None:
    saved(tmp_path, 8, 9, 10, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000010"]
    saved(tmp_path, 99_999_999, 100_000_000, keep=2)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert loaded_step(tmp_path) == 100_000_000


def test_a_kill_while_old_ones_are_removed_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)

    def killed(path: Path, **options: bool) -> None:
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 2, keep=1)
    assert [name for name in names(tmp_path) if name.startswith("step-")] == ["step-00000002"]
    said: list[str] = []
    assert loaded_step(tmp_path, said) == 2
    assert said == []
    assert names(tmp_path) == ["step-00000002"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"optimizer": State(values={"old": 1})}, keep=2)
    saved(tmp_path, 3)
    assert loaded_step(tmp_path) == 3
    assert names(tmp_path) == ["step-00000003"]


def test_where_there_never_was_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "nowhere", print) is None
    (tmp_path / "notes.txt").touch()
    assert load_checkpoint(tmp_path, print) is None


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        newest = saved(tmp_path / "checkpoints", 1)
        save_artifact(tmp_path / "policy", lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"))
    finally:
        os.umask(before)
    files = [*newest.iterdir(), *(tmp_path / "policy").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 4  # a tensor's bytes: safetensors itself would load them without a word
    path.write_bytes(bytes(content))


def edit_manifest(edit: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(newest: Path) -> None:
        manifest = json.loads((newest / "manifest.json").read_text())
        edit(manifest)
        (newest / "manifest.json").write_text(json.dumps(manifest))

    return damage


def swap_for_a_link(newest: Path) -> None:
    (newest / "optimizer.safetensors").rename(newest.parent / "elsewhere")
    (newest / "optimizer.safetensors").symlink_to(newest.parent / "elsewhere")


def swap_all_for_a_link(newest: Path) -> None:
    newest.rename(newest.with_name("moved"))
    newest.symlink_to("moved")


def point_outside(manifest: dict[str, object]) -> None:
    files = manifest["files"]
    assert isinstance(files, dict)
    files["../step-00000002/state.json"] = files["state.json"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda new: os.truncate(new / "optimizer.safetensors", 700), "optimizer.safetensors has 700 bytes instead of 1"),
    "a flipped bit": (lambda new: flip_a_bit(new / "optimizer.safetensors"), "optimizer.safetensors is not what was written"),
    "values cut short": (lambda new: os.truncate(new / "state.json", 20), "state.json has 20 bytes instead of"),
    "a missing file": (lambda new: (new / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "no manifest": (lambda new: (new / "manifest.json").unlink(), "it has no manifest.json"),
    "an empty manifest": (lambda new: os.truncate(new / "manifest.json", 0), "its manifest.json is damaged"),
    "a manifest of zeros": (lambda new: (new / "manifest.json").write_bytes(bytes(300)), "its manifest.json is damaged"),
    "a list for a manifest": (lambda new: (new / "manifest.json").write_text("[1]"), "its manifest.json is damaged"),
    "files without hashes": (edit_manifest(lambda manifest: manifest.update(files={"state.json": {}})), "its manifest.json is damaged"),
    "no values named": (edit_manifest(lambda manifest: manifest.update(files={})), "its manifest.json is another's"),
    "a format that is no number": (edit_manifest(lambda manifest: manifest.update(format="1")), "its manifest.json is another's"),
    "another step's": (edit_manifest(lambda manifest: manifest.update(step=2)), "its manifest.json is another's"),
    "a file too many": (lambda new: (new / "reward.safetensors").write_bytes(b"?"), "reward.safetensors does not belong to it"),
    "a path to the outside": (edit_manifest(point_outside), "'../step-00000002/state.json' is not a plain file in it"),
    "a link for a file": (swap_for_a_link, "'optimizer.safetensors' is not a plain file in it"),
    "a link for the whole": (swap_all_for_a_link, "it is a symbolic link"),
}


@pytest.mark.parametrize("accident", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_taken(tmp_path: Path, accident: str) -> None:
    newest = saved(tmp_path, 1, 2, 3)
    damage, reason = DAMAGE[accident]
    damage(newest)
    said: list[str] = []
    assert loaded_step(tmp_path, said) == 2
    assert len(said) == 1
    assert f"checkpoint {newest} is broken: " in said[0]
    assert reason in said[0]
    assert {"broken-step-00000003", "step-00000001", "step-00000002"} <= set(names(tmp_path))
    assert not newest.exists()


def test_what_others_hide_in_a_checkpoint_does_not_break_it(tmp_path: Path) -> None:
    (saved(tmp_path, 1) / ".DS_Store").touch()
    assert loaded_step(tmp_path) == 1


def test_a_step_may_break_twice(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for _ in range(2):
        (saved(tmp_path, 2) / "state.json").unlink()
        assert loaded_step(tmp_path) == 1
    assert names(tmp_path) == ["broken-step-00000002", "broken-step-00000002-2", "step-00000001"]


def test_when_all_are_damaged_nothing_starts_anew_by_itself_and_a_restored_one_is_taken(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    good = shutil.copytree(tmp_path / "step-00000002", tmp_path / "backup")
    for path in tmp_path.glob("step-*"):
        os.truncate(path / "state.json", 1)
    for _ in range(2):  # The second start finds them set aside, and stops as well.
        with pytest.raises(CheckpointError, match=r"can be trusted \(broken-step-00000001, .*--fresh"):
            load_checkpoint(tmp_path, lambda text: None)
    good.rename(tmp_path / "step-00000002")
    assert loaded_step(tmp_path) == 2


def test_another_format_stops_the_run_and_is_left_alone(tmp_path: Path) -> None:
    newest = saved(tmp_path, 1, 2)
    edit_manifest(lambda manifest: manifest.update(format=2, files="whatever version 2 has"))(newest)
    with pytest.raises(CheckpointError, match="has format 2, and this alignkit reads 1; continue with the version that wrote it"):
        load_checkpoint(tmp_path, print)
    assert newest.is_dir()


def test_what_a_kill_left_behind_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for leftover in (".tmp-2-4711", ".del-step-00000000-4711"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / leftover)
    assert loaded_step(tmp_path) == 1
    assert names(tmp_path) == ["step-00000001"]


def test_loaded_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    newest = saved(tmp_path, 1)
    found = load_checkpoint(tmp_path, print)
    assert found is not None
    with (newest / "optimizer.safetensors").open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\xff\xff\xff\xff")
        handle.truncate(10)
    assert found.states["optimizer"].tensors["weights"][-1] == 300.0


@pytest.mark.parametrize("value", [math.nan, {"deep": [1.0, -math.inf]}, {1, 2}])
def test_values_that_json_does_not_have_are_refused_by_name(tmp_path: Path, value: object) -> None:
    saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"'kl_coef' in the state of 'optimizer' is not JSON \(.*\); what was saved before is intact"):
        save_checkpoint(tmp_path, 2, {"optimizer": State(values={"steps": 1, "kl_coef": value})}, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_disk_that_fills_while_saving_costs_nothing_but_that_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync_file", full)
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: the disk is full \(.*saved before is intact"):
            saved(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert loaded_step(tmp_path) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: that needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_before_and_while_saving(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_disk / "checkpoints"
    large = {**state(2), "critic": State({"weights": torch.zeros(2 * 2**18)})}  # 2 MiB
    saved(folder, 1)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2 * 2**20))
    with pytest.raises(CheckpointError, match=r"needs 2\.2 MB and [01]\.\d MB are free; what was saved before is intact: repair this"):
        save_checkpoint(folder, 2, large, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_check_room", lambda folder, states: None)
        with pytest.raises(CheckpointError, match=r"the disk is full \(.*what was saved before is intact"):
            save_checkpoint(folder, 2, large, keep=1)
    with pytest.raises(CheckpointError, match="policy cannot be written: the disk is full"):
        save_artifact(small_disk / "policy", holding("model", "x" * 2**21))
    assert names(small_disk) == ["ballast", "checkpoints"]
    assert names(folder) == ["step-00000001"]
    assert loaded_step(folder) == 1
    ballast.unlink()
    save_checkpoint(folder, 2, large, keep=1)
    assert loaded_step(folder) == 2


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_with_one_message_and_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "alignkit", "run", str(SMOKE), f"dir={folder}", "checkpoint.minutes=0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    stopped = run(small_disk / "run")
    assert stopped.returncode == 74
    assert "not saved after step 2, and going on; 3 times in a row would end the run: a checkpoint in " in stopped.stdout
    assert stopped.stderr.startswith("error: 3 times in a row, now after step 4: a checkpoint in ")
    assert stopped.stderr.endswith("what was saved before is intact: repair this and run the same command again\n")
    assert stopped.stderr.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert "continuing after step 1\n" in run(small_disk / "run").stdout
    never_stopped = run(tmp_path / "never_stopped")
    assert never_stopped.returncode == 0, never_stopped.stderr
    for weights in ("sft/policy/model.safetensors", "reward/reward_model/head.safetensors", "ppo/policy/model.safetensors"):
        assert sha256(small_disk / "run" / weights) == sha256(tmp_path / "never_stopped" / weights)


def test_a_read_only_disk(small_disk: Path) -> None:
    saved(small_disk / "checkpoints", 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: the file system is read-only \("):
        saved(small_disk / "checkpoints", 2)
    with pytest.raises(RunError, match=r"run\.json cannot be written: the file system is read-only"):
        write_json(small_disk / "run.json", {})
    assert loaded_step(small_disk / "checkpoints") == 1


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, as a user who may not write to it."""
    saved(tmp_path / "first", 1)  # Imports what saving needs, while it can still be read.
    place = tmp_path / "closed"
    place.mkdir()
    monkeypatch.chdir(place)
    place.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield Path()
    if root:
        os.seteuid(0)
    place.chmod(0o755)


def test_a_folder_that_may_not_be_written_to(nobody: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be written: permission denied \("):
        saved(nobody / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="policy cannot be written: permission denied"):
        save_artifact(nobody / "policy", lambda folder: None)


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = saved(tmp_path, 1, 2)

    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("alignkit.files.sha256", denied)
    with pytest.raises(CheckpointError, match="cannot be read: permission denied"):
        load_checkpoint(tmp_path, print)
    assert newest.is_dir()


def test_a_disk_that_cannot_read_a_file_any_more_costs_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = saved(tmp_path, 1, 2)

    def worn_out(path: Path) -> str:
        if newest in path.parents:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256(path)

    monkeypatch.setattr("alignkit.files.sha256", worn_out)
    said: list[str] = []
    assert loaded_step(tmp_path, said) == 1
    assert "it cannot be read ([Errno 5] Input/output error" in said[0]


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from alignkit.checkpoint import load_checkpoint, save_checkpoint
from alignkit.interfaces import State

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
base = torch.zeros(50_000)
random.seed(0)

def step_of(found):
    assert all(bool((part.tensors["x"] == found.step).all()) and part.values == {"step": found.step} for part in found.states.values())
    return found.step

def work():
    found = load_checkpoint(folder, lambda text: print(text, file=sys.stderr))
    step = step_of(found) if found else 0
    assert not [name for name in os.listdir(folder) if name.startswith(".")] if found else True
    os.write(ready[1], b"r")
    while True:
        step += 1
        save_checkpoint(folder, step, {name: State({"x": base + step}, {"step": step}) for name in ("a", "b", "c")}, keep=2)

save_checkpoint(folder, 1, {"a": State({"x": base + 1}, {"step": 1})}, keep=2)
steps, halves, said, ready = [], 0, [], os.pipe()
# At least so many kills, and as many more as it takes to hit a save: how fast the disk is does not decide the test.
while len(steps) < 20 * kills and (len(steps) < kills or not halves or steps[-1] == 1):
    child = os.fork()
    if child == 0:
        work()
    os.read(ready[0], 1)
    time.sleep(random.uniform(0.05, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    halves += any(name.startswith(".") for name in os.listdir(folder))
    steps.append(step_of(load_checkpoint(folder, said.append)))
print(json.dumps({"steps": steps, "halves": halves, "said": said, "left": sorted(os.listdir(folder))}))
"""


def test_killed_again_and_again_while_saving_it_always_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    # One thread: a forked child has none of its parent's workers and would wait for them.
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLS, str(tmp_path), "10"]
    done = subprocess.run(command, env=one, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["steps"] == sorted(outcome["steps"])  # Nothing that was saved is lost again.
    assert outcome["steps"][-1] > 1
    assert outcome["halves"] > 0, "no kill hit a save: the test has lost its point"
    assert outcome["said"] == []  # What was half written never had a checkpoint's name.
    assert all(name.startswith("step-") for name in outcome["left"])


def test_an_artifact_appears_whole_with_its_hashes_and_replaces_an_older_one(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    save_artifact(policy, holding("old.txt", "old"))
    (tmp_path / ".tmp-policy-4711").mkdir()

    def write(folder: Path) -> None:
        assert (policy / "old.txt").is_file()
        (folder / "adapter").mkdir()
        (folder / "adapter" / "a.txt").write_text("a")
        (folder / "config.json").write_text("{}")

    hashes = save_artifact(policy, write)
    assert list(hashes) == ["adapter/a.txt", "config.json"]
    assert hashes["adapter/a.txt"] == FileHash("ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb", 1)
    assert names(tmp_path) == ["policy"]
    assert names(policy) == ["adapter", "config.json"]
    verify(policy, hashes)


def test_an_artifact_that_fails_halfway_leaves_the_older_one(tmp_path: Path) -> None:
    save_artifact(tmp_path / "policy", holding("a.txt", "a"))

    def write(folder: Path) -> None:
        (folder / "a.txt").write_text("b")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_artifact(tmp_path / "policy", write)
    assert names(tmp_path) == ["policy"]
    assert (tmp_path / "policy" / "a.txt").read_text() == "a"


def test_an_artifact_that_was_changed_is_named_with_the_difference(tmp_path: Path) -> None:
    hashes = save_artifact(tmp_path / "policy", holding("a.txt", "a"))
    (tmp_path / "policy" / "a.txt").write_text("b")
    with pytest.raises(CheckpointError, match=r"policy is not what its stage wrote: a\.txt is not what was written; restore it"):
        verify(tmp_path / "policy", hashes)
    shutil.rmtree(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        verify(tmp_path / "policy", hashes)


def test_a_json_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"name": "Grüße", "half": "\ud83d"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "run.json", {"name": math.nan})
    with pytest.raises(RunError, match=r"nowhere.run\.json cannot be written: .*No such file or directory"):
        write_json(tmp_path / "nowhere" / "run.json", {})
    assert json.loads((tmp_path / "run.json").read_text()) == {"name": "Grüße", "half": "\ud83d"}
    assert names(tmp_path) == ["run.json"]
