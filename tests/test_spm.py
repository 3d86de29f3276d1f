"""A vocabulary of SentencePiece: what stands before a word decides which token it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import with_facts

from safegene_edge import SafeLlama
from safegene_edge.runtime.refusal_margin import Openers

WORDS = ("\u2581", "I", "\u2581I", "'", "m", "\u2581sorry", "S", "o", "r", "y", "\u2581S",
         "\u2581a")  # fmt: skip
CONTROLS = ("<|im_start|>", "<|im_end|>")
NORMAL, UNKNOWN, CONTROL, BYTE, UNUSED = 1, 2, 3, 6, 5
PIECES = {
    "<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL,
    **{f"<0x{byte:02X}>": BYTE for byte in range(256)},
    **dict.fromkeys(WORDS, NORMAL), **dict.fromkeys(CONTROLS, CONTROL),
}  # fmt: skip
TOKENS = [*PIECES, *(f"<unused{n}>" for n in range(300 - len(PIECES)))]
SPM: dict[str, Any] = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [PIECES.get(token, UNUSED) for token in TOKENS],
    "tokenizer.ggml.scores": [float(len(token)) if token in WORDS else -1e3 for token in TOKENS],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
}  # fmt: skip
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INLINE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}</s>{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def opened(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., SafeLlama]:
    def open_(**facts: Any) -> SafeLlama:
        path = with_facts(tiny("llama").gguf_path, tmp_path / "spm.gguf", {**SPM, **facts})
        return SafeLlama(path, n_ctx=256)

    return open_


@pytest.mark.parametrize(("template", "first"), [(TURNS, "I"), (INLINE, "\u2581I")])
def test_openers_are_the_tokens_that_the_assistant_says(
    opened: Callable[..., SafeLlama], template: str, first: str
) -> None:
    """Behind a line's end no space is put before the first word; in a text of its own one is."""
    with opened(**{"tokenizer.chat_template": template}) as llama:
        alone = llama.tokenize(b"I'm sorry", add_bos=False, special=False)
        assert TOKENS[alone[0]] == "\u2581I"
        (said,) = Openers.of(llama, ["I'm sorry, but"]).all
        assert [TOKENS[token] for token in said] == [first, "'", "m"]
        (whole,) = Openers.of(llama, ["Sorry"]).all
        assert llama.text(whole).strip() == "Sor"
        turns = [*USER, {"role": "assistant", "content": "I'm sorry, but no."}]
        prompt = llama.render_answer(USER)
        assert tuple(llama.render(turns, add_generation_prompt=False)[len(prompt) :][:3]) == said


def test_choices_and_words_are_spoken_as_the_assistant_says_them(
    opened: Callable[..., SafeLlama],
) -> None:
    with opened(**{"tokenizer.chat_template": TURNS}) as llama:
        for text, first in (("I", "I"), (" I", "\u2581I"), ("Sorry", "S")):
            assert TOKENS[llama.spoken(text)[0]] == first
            assert llama.text(llama.spoken(text)).strip() == text.strip()
        assert llama.spoken("Sorry") != llama.tokenize(b"Sorry", add_bos=False, special=False)


def test_where_the_template_shows_no_answer_openers_stand_alone(
    opened: Callable[..., SafeLlama],
) -> None:
    template = "{{ messages[0].content }}\n"
    with opened(**{"tokenizer.chat_template": template}) as llama:
        (said,) = Openers.of(llama, ["I'm sorry"]).all
        assert said == tuple(llama.tokenize(b"I'm sorry", add_bos=False, special=False)[:3])


@pytest.mark.parametrize("writes_bos", [False, True])
def test_a_prompt_does_not_end_where_the_file_asks_for_an_end(
    opened: Callable[..., SafeLlama], writes_bos: bool
) -> None:
    """`add_eos_token`, as fine-tuning leaves it behind, is of texts to train on."""
    template = ("<s>" if writes_bos else "") + TURNS
    facts = {"tokenizer.chat_template": template, "tokenizer.ggml.add_eos_token": True}
    with opened(**facts) as llama:
        hidden = [*USER, {"role": "user", "content": "An <|im_end|> in a text."}]
        for turns in (USER, hidden):
            tokens = llama.render(turns)
            assert tokens[0] == 1 and tokens.count(1) == 1 and 2 not in tokens
        assert TOKENS[tokens[-1]] == "<0x0A>"
