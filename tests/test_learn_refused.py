"""What cannot be learnt from, and what the command line says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from adapters import with_facts
from tiny import CHAT_TEMPLATE

from safegene_edge import Engine, learn
from safegene_edge.errors import (
    FileFormatError,
    MismatchError,
    NoEffectError,
    OutputError,
    SettingError,
)
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.learn import LearnSettings, states, teachers
from safegene_edge.learn.base import find_base
from safegene_edge.learn.run import _Learning, plan
from safegene_edge.prompts import Prompt, load_prompts
from safegene_edge.recalibrate import Examples


def changed(model: Path, folder: Path, **metadata: Any) -> Path:
    """A copy with other metadata; None leaves a key out."""
    return with_facts(model, folder / "changed.gguf", {**metadata, "granite.logit_scale": 1.0})


FEW = LearnSettings(prompts=16, rank=2)


def test_models_of_two_families_are_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    llama = tiny("llama", num_hidden_layers=5).gguf_path
    for other, what in ((tiny("qwen2").gguf_path, "architecture"),
                        (tiny("llama").gguf_path, "shapes")):  # fmt: skip
        with pytest.raises(MismatchError, match=f"{other}.*not of the family.*another {what}"):
            learn([llama], other, settings=FEW)
    tokens = [f"{n}" for n in range(300)]
    other = changed(llama, tmp_path, **{"tokenizer.ggml.tokens": tokens})
    with pytest.raises(MismatchError, match=r"another tokenizer \(token 0 is '0' in place of '"):
        learn([llama], other, settings=FEW)
    tokens = GGUFFile(llama).strings("tokenizer.ggml.tokens")
    tokens[200] += "'"  # where tokens of text are in another order, or others
    other = changed(llama, tmp_path, **{"tokenizer.ggml.tokens": tokens})
    with pytest.raises(MismatchError, match=r"token 200 is '.+'' in place of '"):
        learn([llama], other, settings=FEW)


def test_a_teacher_must_refuse(tiny: Callable[..., Any]) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(NoEffectError, match=r"refuses only 0 of 16 harmful prompts"):
        learn([path], path, settings=FEW)
    for one in ([path], path, str(path)):
        with pytest.raises(NoEffectError, match=r"hardly moves it: .* 0% without and 0% with"):
            learn(one, settings=FEW)


def test_a_teacher_must_refuse_more_than_the_target(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(NoEffectError, match=r"refuses no more than .*: 100% and 100% of 16"):
        learn([path], path, settings=FEW)


def test_where_a_few_prompts_show_no_loss_all_are_asked(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def share(engine: Engine, tried: Sequence[Any], scales: Any) -> float:
        asked.append(len(tried))
        return 1.0 if len(tried) == teachers.TRIED else 0.9

    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(sys.modules["safegene_edge.learn.run"], "share_refused", share)
    monkeypatch.setattr(_Learning, "with_aligned_facts", lambda self, gene, teacher: gene)
    path = tiny("llama", num_hidden_layers=5).gguf_path
    assert learn([path], path, settings=LearnSettings(prompts=32, rank=2)).layers
    assert asked == [teachers.TRIED, 32]


def test_a_template_that_opens_answers_otherwise_is_refused(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are counted from where an answer begins: another header would shift them."""
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(_Learning, "_require_lost", lambda *_: None)
    path = tiny("llama", num_hidden_layers=5).gguf_path
    for name in ("<|im_start|>model\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "A"):
        template = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", name)
        assert template != CHAT_TEMPLATE
        other = changed(path, tmp_path, **{"tokenizer.chat_template": template})
        with pytest.raises(MismatchError, match="opens an answer otherwise"):
            learn([path], other, settings=FEW)


def test_task_prompts_that_do_not_fit_are_named(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(_Learning, "_require_lost", lambda *_: None)
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(SettingError, match=r"the task prompt .aaa.*needs \d+ .* has 512"):
        learn([path], path, task=["Hello", "a" * 600], settings=FEW)
    monkeypatch.setattr(sys.modules["safegene_edge.learn.run"], "memory_bytes", lambda: 1 << 20)
    with pytest.raises(SettingError, match=r"takes at least \d+\.\d GiB .* shorter or fewer task"):
        learn([path], path, settings=FEW)


def test_a_base_model_and_a_template_without_system_prompts_are_named(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    base = changed(path, tmp_path, **{"tokenizer.chat_template": None})
    with pytest.raises(SettingError, match="has no chat template: a base model"):
        learn([base], settings=FEW)
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    other = changed(path, tmp_path, **{"tokenizer.chat_template": strict})
    with pytest.raises(SettingError, match="its template takes no system prompt"):
        learn([other], settings=FEW)
    spoken = Prompt("", "Hello", history=(("system", "Be kind."),))
    with pytest.raises(
        SettingError, match=r"the task prompt .Hello.: .*its chat template failed \(no\)"
    ):
        learn([other], path, task=["Hello", spoken], settings=FEW)


def test_a_full_disk_is_named(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(states.tempfile, "TemporaryFile", lambda **_: Full())
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(OutputError, match=r"cannot hold the states.*No space left"):
        learn([path], path, settings=FEW)


def test_layers_that_cannot_be_fitted_are_named(tiny: Callable[..., Any]) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    for layers in ((0, 2), (1, 4), (3, 2)):
        with pytest.raises(SettingError, match=r"Give layers from 1 to 3"):
            learn([path], path, settings=LearnSettings(layers=layers))
    with pytest.raises(SettingError, match="no degraded model"):
        learn([], path)


@pytest.mark.parametrize(("itself", "first"), [(False, 6), (True, 8)])
def test_the_lowest_layers_are_left_out(itself: bool, first: int, tiny: Callable[..., Any]) -> None:
    file = GGUFFile(tiny("llama", num_hidden_layers=16).gguf_path)
    layers = plan(file, LearnSettings().for_teacher(itself=itself))[0]
    assert layers == list(range(first, 15))


def test_a_setting_that_has_one_default_needs_a_number() -> None:
    for name in ("ridge", "text_weight", "overshoot"):
        for value in (None, 0.0, float("nan")):
            with pytest.raises(SettingError, match=f"{name} is {value}"):
                LearnSettings(**{name: value})  # type: ignore[arg-type]
    own = LearnSettings().for_teacher(itself=True)
    assert (own.ridge, own.contrast, own.harmless_weight) == (0.3, 1.0, 2.0)


def test_the_budget_bounds_the_rank(tiny: Callable[..., Any]) -> None:
    file = GGUFFile(tiny("llama", num_hidden_layers=5).gguf_path)
    size = sum(info.n_elements for info in file.tensors.values())
    layers, rank = plan(file, LearnSettings().for_teacher(itself=False))
    assert layers == [1, 2, 3] and 1 < rank < 8
    per_rank = sum(sum(file.tensors[f"blk.{n}.attn_output.weight"].shape) for n in layers)
    assert rank * per_rank <= size / 100 < (rank + 1) * per_rank
    assert plan(file, LearnSettings(rank=5, layers=(2, 2))) == ([2], 5)


def test_the_command_says_it_in_one_line(tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n")
    given = ["learn", "--degraded", str(path), "-o", str(tmp_path / "gene.gguf")]
    for more, said in (
        (["--task", str(prompts)], "holds no prompts"),
        (["--task", str(tmp_path / "none.txt")], "none.txt"),
        (["--aligned", str(tmp_path / "none.gguf")], "none.gguf"),
        (["--prompts", "16"], "hardly moves it"),
    ):
        ran = in_cli(*given, *more)
        assert ran.returncode == 2, ran.stderr
        assert said in ran.stderr.splitlines()[-1] and "Traceback" not in ran.stderr
        assert ran.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "gene.gguf").exists()


def in_cli(*arguments: str) -> Any:
    command = [sys.executable, "-c", "from safegene_edge.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_prompts_are_read_as_lines_or_rows(tmp_path: Path) -> None:
    file = tmp_path / "p"
    file.write_text('Say hello\n\n{"prompt": "Say bye", "form": "imperative"}\n')
    assert [p.text for p in load_prompts(file)] == ["Say hello", "Say bye"]
    for text, said in (
        ('{"prompt": 3}', "line 1 is no prompt"),
        ("{", "line 1"),
        ("\n", "no prompts"),
    ):
        file.write_text(text)
        with pytest.raises(FileFormatError, match=said):
            load_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="UTF-8"):
        load_prompts(file)


def test_prompts_may_be_one_json_array_or_texts_in_quotes(tmp_path: Path) -> None:
    file = tmp_path / "p"
    for text, wanted in (
        (json.dumps([{"prompt": "Say hello"}, "Say bye"], indent=2), ["Say hello", "Say bye"]),
        ('"Say \\"hello\\""\n"Say bye" twice', ['Say "hello"', '"Say bye" twice']),
        ("[INFO] Say hello\nSay bye", ["[INFO] Say hello", "Say bye"]),
    ):
        file.write_text(text)
        assert [p.text for p in load_prompts(file)] == wanted
    file.write_text('["Say hello", {"text": "Say bye"}]')
    with pytest.raises(FileFormatError, match="item 2 is no prompt"):
        load_prompts(file)
    for item in ("null", "3", '["a"]', '""'):
        file.write_text(f'["Say hello", {item}]')
        with pytest.raises(FileFormatError, match="item 2 is no prompt"):
            load_prompts(file)


def test_a_path_is_no_list_of_prompts(tiny: Callable[..., Any]) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    for task in ("prompts.txt", Path("prompts.txt"), b"prompts.txt"):
        with pytest.raises(SettingError, match=r"no list, but .*load_prompts"):
            learn([path], path, task=task, settings=FEW)  # type: ignore[arg-type]
        with pytest.raises(SettingError, match="no list"):
            Examples.shipped(task=task)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="task prompt 2 is empty"):
        learn([path], path, task=["Hello", " "], settings=FEW)


def test_the_base_that_a_fine_tune_names_is_found(tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    folder, key = tmp_path / "models", "general.base_model.0.repo_url"
    folder.mkdir()
    (folder / "broken.gguf").write_bytes(b"no GGUF")
    named = {key: "https://huggingface.co/Somebody/Tiny-Chat_1B"}
    target = GGUFFile(changed(path, tmp_path, **named))
    with pytest.raises(MismatchError, match=r"none of its 0 models is tiny chat 1b"):
        find_base(target, folder)
    for name, kind, file in (("Tiny Chat 1B", 7, "a"), ("Tiny Chat 1B", 0, "b"), ("Else", 0, "c")):
        facts = {"general.name": name, "general.file_type": kind}
        changed(path, folder, **facts).rename(folder / f"{file}.gguf")
    assert find_base(target, folder).name in ("a.gguf", "b.gguf")
    own = changed(path, tmp_path, **named, **{"general.file_type": 0})
    assert find_base(GGUFFile(own), folder) == folder / "b.gguf"
    (folder / "link.gguf").symlink_to(own)  # the target itself, under another name
    itself = GGUFFile(changed(path, tmp_path, **named, **{"general.name": "Tiny Chat 1B"}))
    assert find_base(itself, folder) != folder / "link.gguf"
    (folder / "link.gguf").unlink()
    with pytest.raises(MismatchError, match="does not say what it was made from"):
        find_base(GGUFFile(path), folder)
    with pytest.raises(NoEffectError, match=r"b\.gguf: refuses only 0 of 16"):
        learn([own], folder, settings=FEW)
