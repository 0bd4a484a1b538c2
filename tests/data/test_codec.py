"""What is trained, where a prompt ends, and that every response ends with its stop token: for templates of every awkward sort."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import AutoTokenizer

from alignkit.data.codec import DEFAULT_CHAT_TEMPLATE, TemplateCodec
from alignkit.errors import DataError, ModelError
from alignkit.types import Demonstration, Message, Prompt, RankedRows, Ranking, Sample
from tests.data.chat import BOS, ENDLESS, STOP, STRICT, TEMPLATES, ask, codec, merging_codec, plain, trained, turns

every_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def test_the_default_template_is_chatml() -> None:
    text = codec()._render((Message("system", "s"), *turns("u", "a")), answer=True)
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>assistant\n"
    )


@every_template
def test_every_assistant_turn_is_trained_with_its_end_and_without_the_newline_after_it(template: str) -> None:
    each = codec(template)
    row = each.demonstration(Demonstration(ask("Hi"), turns("Hello!", "And?", "Bye.", first="assistant")))
    assert trained(each, row) == ["Hello!<|im_end|>", "Bye.<|im_end|>"]
    assert sum(row.loss_mask) == len("Hello!") + 1 + len("Bye.") + 1


@every_template
def test_assistant_turns_of_the_prompt_are_not_trained(template: str) -> None:
    each = codec(template)
    row = each.demonstration(Demonstration(Prompt("p", turns("Hi", "Hello!", "And?")), turns("Bye.", first="assistant")))
    assert trained(each, row) == ["Bye.<|im_end|>"]


@every_template
@pytest.mark.parametrize("response", ["Sure.", "", " two\n\nlines\n", "巴黎 🗼", "I write <|im_end|> and go on"])
def test_a_sample_is_its_prompt_then_its_response_then_the_stop_token(template: str, response: str) -> None:
    each = codec(template)
    prompt = Prompt("p", turns("Hi", "Hello!", "And?"))
    row, before = each.sample(Sample(prompt, response, finished=False)), each.prompt(prompt)
    assert row.ids == (*before, *each.tokenizer(response).input_ids, STOP)
    assert row.loss_mask == (False,) * len(before) + (True,) * (len(row) - len(before))


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name.startswith("generation")])
def test_a_template_that_marks_its_turns_trains_the_same_tokens_as_one_that_does_not(template: str) -> None:
    marked = TEMPLATES[template]
    unmarked = re.sub(r"\{%-? (end)?generation -?%\}", "", marked)
    assert unmarked != marked
    demonstration = Demonstration(Prompt("p", turns("Hi", "Hello!", "And?")), turns("Bye.", "One more", "No 🗼", first="assistant"))
    assert codec(marked).demonstration(demonstration) == codec(unmarked).demonstration(demonstration)


def test_thoughts_that_a_template_drops_from_earlier_turns_do_not_hide_those_turns() -> None:
    each = codec(TEMPLATES["earlier turns differ"])
    row = each.demonstration(Demonstration(ask("Hi"), turns("<think>hm</think>Hello!", "And?", "<think>hm</think>Bye.", first="assistant")))
    assert trained(each, row) == ["Hello!<|im_end|>", "<think>hm</think>Bye.<|im_end|>"]


@every_template
def test_a_pad_token_that_is_the_stop_token_changes_nothing(template: str) -> None:
    demonstration = Demonstration(ask("Hi"), turns("Hello!", "And?", "Bye.", first="assistant"))
    row = codec(template, pad="<|im_end|>").demonstration(demonstration)
    assert row == codec(template).demonstration(demonstration)
    assert row.ids[-1] == STOP
    assert row.loss_mask[-1]


@every_template
@settings(max_examples=20, deadline=None)
@given(data=some.data())
def test_what_the_user_says_does_not_change_what_is_trained(template: str, data: some.DataObject) -> None:
    letters = some.text("abc .\n", min_size=6, max_size=6)
    each = codec(template)

    def mask(first: str, second: str) -> tuple[bool, ...]:
        mask: tuple[bool, ...] = each.demonstration(Demonstration(ask(first), turns("Hello!", second, "Bye.", first="assistant"))).loss_mask
        return mask

    assert mask(data.draw(letters), data.draw(letters)) == mask("abcdef", "ghijkl")


def test_a_beginning_of_text_that_the_template_writes_is_there_once() -> None:
    each = codec(TEMPLATES["bos in the text"], before="<|end|>")
    assert each.prompt(ask("Hi")).count(BOS) == 1
    assert each.sample(Sample(ask("Hi"), "Hello!")).ids.count(BOS) == 1


def test_plain_text_gets_what_its_tokenizer_puts_before_it_once_and_nothing_after_it() -> None:
    each = codec(before="<|end|>", after="<|im_end|>")
    hi, ho = (tuple(each._tokens(text)) for text in ("Hi", " ho"))
    assert each.prompt(plain("Hi")) == (BOS, *hi)
    assert each.prompt(plain("<|end|>Hi")) == (BOS, *hi)
    row = each.sample(Sample(plain("Hi"), " ho"))
    assert row.ids == (BOS, *hi, *ho, STOP)
    assert row.loss_mask == (False, False, False, True, True, True, True)


def test_a_stop_token_at_the_end_of_plain_text_is_not_doubled() -> None:
    each = codec()
    assert each.sample(Sample(plain("Hi"), " ho<|im_end|>")) == each.sample(Sample(plain("Hi"), " ho"))


def test_an_empty_response_is_a_stop_token_even_after_a_prompt_that_ends_with_one() -> None:
    row = codec().sample(Sample(plain("Hi<|im_end|>"), ""))
    assert row.ids[-2:] == (STOP, STOP)
    assert row.loss_mask == (False, False, False, True)


def test_a_merge_across_the_border_of_plain_text_is_trained_whole() -> None:
    each = merging_codec()
    row = each.sample(Sample(plain("is th"), "e theme"))
    tokens = [each.shown([i]) for i in row.ids]
    assert tokens == [*[each.shown([i]) for i in each.prompt(plain("is"))], " the", " theme", "<|stop|>"]
    assert trained(each, row) == [" the theme<|stop|>"]


def test_no_merge_across_the_border_leaves_the_prompt_as_it_is() -> None:
    each = merging_codec()
    prompt = plain("is the")
    row = each.sample(Sample(prompt, " theme"))
    assert row.ids == (*each.prompt(prompt), *each._tokens(" theme"), 0)
    assert trained(each, row) == [" theme<|stop|>"]


def test_a_ranking_keeps_what_is_known_about_it() -> None:
    each = codec()
    ranked = each.ranked(Ranking(ask("Hi", "r"), ("a", "bb"), (2, 1), labeler="kim", weight=2.0, margin=0.5, preference=0.25))
    assert [trained(each, row) for row in ranked.rows] == [["a<|im_end|>"], ["bb<|im_end|>"]]
    assert ranked == RankedRows("r", ranked.rows, (2, 1), labeler="kim", weight=2.0, margin=0.5, preference=0.25)


def test_a_template_that_never_ends_a_turn_is_refused() -> None:
    with pytest.raises(DataError, match=r"does not end the assistant's turn with a stop token \(<\|im_end\|>\).*chat_template: default"):
        codec(ENDLESS).sample(Sample(ask("Hi"), "Hello!"))


def test_a_template_that_ends_only_the_last_turn_is_refused_where_there_are_two() -> None:
    each = codec(ENDLESS.replace("{% endfor %}", "{% endfor %}{% if not add_generation_prompt %}<|im_end|>{% endif %}", 1))
    assert trained(each, each.sample(Sample(ask("Hi"), "Hello!"))) == ["Hello!\n<|im_end|>"]
    with pytest.raises(DataError, match="stop token"):
        each.demonstration(Demonstration(ask("Hi"), turns("Hello!", "And?", "Bye.", first="assistant")))


def test_turns_that_a_template_leaves_out_of_its_blocks_are_not_trained() -> None:
    only_the_last = TEMPLATES["generation without the end"].replace("{% if m.role == 'assistant' %}", "{% if loop.last %}")
    each = codec(only_the_last)
    row = each.demonstration(Demonstration(ask("Hi"), turns("Hello!", "And?", "Bye.", first="assistant")))
    assert trained(each, row) == ["Bye.<|im_end|>"]


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    with pytest.raises(DataError, match=r"refuses the conversation \(system, user\): system turns are not supported"):
        codec(STRICT).prompt(Prompt("p", (Message("system", "s"), Message("user", "u"))))


def test_conversations_without_a_template_say_what_to_set() -> None:
    with pytest.raises(DataError, match=r"no chat template; set policy\.chat_template: default"):
        codec(None).prompt(ask("Hi"))
    assert codec(None).prompt(plain("Hi")) == codec().prompt(plain("Hi"))


def test_a_completion_without_an_assistant_turn_is_refused() -> None:
    with pytest.raises(DataError, match="no token of it would be trained"):
        codec().demonstration(Demonstration(ask("Hi"), (Message("user", "Hello?"),)))


def test_a_stop_token_with_nothing_before_it_cannot_be_learned() -> None:
    # Nothing predicts the first token of a row.
    with pytest.raises(DataError, match="no token of it would be trained"):
        codec().sample(Sample(plain(""), ""))


def test_of_several_templates_the_default_one_counts() -> None:
    several = {"tool_use": ENDLESS, "default": DEFAULT_CHAT_TEMPLATE}
    assert codec(several).prompt(ask("Hi")) == codec().prompt(ask("Hi"))
    with pytest.raises(ModelError, match=r"\['tool_use'\] and none named default"):
        codec({"tool_use": ENDLESS})


def test_decoding_leaves_special_tokens_out_and_showing_does_not() -> None:
    each = codec()
    ids = [*each._tokens("well , it 's fine .\n"), STOP]
    assert each.decode(ids) == "well , it 's fine .\n"
    assert each.shown(ids) == "well , it 's fine .\n<|im_end|>"


def test_the_hash_follows_the_template_and_the_stop_ids_and_survives_saving(tmp_path: Path) -> None:
    each = codec()
    each.tokenizer.save_pretrained(tmp_path)
    assert TemplateCodec(AutoTokenizer.from_pretrained(tmp_path), (STOP,)).template_hash == each.template_hash
    assert len({each.template_hash, codec(ENDLESS).template_hash, TemplateCodec(each.tokenizer, (STOP, BOS)).template_hash}) == 3
