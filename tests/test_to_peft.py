"""GGUF LoRA to PEFT folder: the same there and back, exactly or within a float32 step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as tiny_models
from safetensors.numpy import load_file
from tiny import lora_settings, peft_deltas, relative_error

from safegene_edge.converters import convert, to_peft
from safegene_edge.converters.names import BaseNames
from safegene_edge.errors import FileFormatError, MismatchError, OutputError, SafeGeneError
from safegene_edge.gene import Adapter, Pair
from safegene_edge.gguf_file import GGUFFile

ARCHITECTURES = tiny_models.ARCHITECTURES
CASES = [(arch, name) for arch in ARCHITECTURES for name in lora_settings(arch)]
FILES = ("adapter_config.json", "adapter_model.safetensors")


def there_and_back(folder: Path, base: Path, tmp_path: Path) -> Path:
    convert(folder, base, tmp_path / "adapter.gguf")
    to_peft(tmp_path / "adapter.gguf", base, tmp_path / "back")
    return tmp_path / "back"


def assert_same_pairs(one: Adapter, other: Adapter, steps: int = 0) -> None:
    """The same tensors to within so many steps of their type, and the same scales."""
    assert list(one.pairs) == list(other.pairs)
    for name, pair in one.pairs.items():
        again = other.pairs[name]
        for left, right in ((pair.a, again.a), (pair.b, again.b)):
            assert left.dtype == right.dtype, name
            np.testing.assert_array_max_ulp(left, right, maxulp=steps)
        assert one.effective_scale(name) == pytest.approx(other.effective_scale(name), rel=1e-7)


# -- PEFT, GGUF, PEFT -----------------------------------------------------


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_peft_to_gguf_to_peft_is_exact_but_for_folded_factors(
    arch: str,
    name: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    folder = tiny_adapter(arch, **lora_settings(arch)[name])
    back = there_and_back(folder, tiny(arch).gguf_path, tmp_path)
    assert sorted(path.name for path in back.iterdir()) == sorted(FILES)
    assert (folder / FILES[0]).read_bytes() == (back / FILES[0]).read_bytes()
    if "safegene.peft.folded" not in Adapter.load(tmp_path / "adapter.gguf").extra:
        assert (folder / FILES[1]).read_bytes() == (back / FILES[1]).read_bytes()
        return
    before, after = load_file(folder / FILES[1]), load_file(back / FILES[1])
    assert list(before) == list(after)
    for key, values in before.items():
        np.testing.assert_array_max_ulp(after[key], values, maxulp=1 if "lora_B" in key else 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("alpha", [4, 7, 1e-30, -3e20])
def test_the_type_comes_back_too(
    dtype: str,
    alpha: float,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    folder = tiny_adapter("llama", dtype=dtype, alpha_pattern={"q_proj": alpha})
    back = there_and_back(folder, tiny("llama").gguf_path, tmp_path)
    for file in FILES:
        assert (folder / file).read_bytes() == (back / file).read_bytes()


def test_mixed_types_come_back(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "peft"
    folder.mkdir()
    source = tiny_adapter("llama", rank_pattern={"q_proj": 7}, use_rslora=True)
    tensors = load_file(source / FILES[1])
    changed = {
        name: values.bfloat16() if "q_proj.lora_B" in name else values.half()
        for name, values in tensors.items()
        if "down" not in name
    }
    save_file(tensors | changed, folder / FILES[1], {"format": "pt"})
    (folder / FILES[0]).write_bytes((source / FILES[0]).read_bytes())
    back = there_and_back(folder, tiny("llama").gguf_path, tmp_path)
    restored, expected = load_file(back / FILES[1]), load_file(folder / FILES[1])
    assert set(restored) == set(expected)
    for name, values in expected.items():
        assert restored[name].dtype == values.dtype
        assert restored[name].equal(values)


# -- GGUF, PEFT, GGUF -----------------------------------------------------


def _foreign(model: tiny_models.TinyModel, alpha: float, kind: str) -> Adapter:
    """A GGUF LoRA that never was a PEFT folder."""
    random = np.random.default_rng(3)
    names = BaseNames(GGUFFile(model.gguf_path))
    pairs = {}
    for number, name in enumerate(names.modules):
        if kind == "some layers" and number % 3 == 0:
            continue
        rank = 2 + number % 3 if kind == "mixed ranks" else 4
        out, width = names.model.tensors[name].shape
        dtype = np.float16 if kind == "float16" else np.float32
        a = random.standard_normal((rank, width)).astype(dtype)
        b = random.standard_normal((out, rank)).astype(dtype)
        pairs[name] = Pair(a, b)
    return Adapter(model.arch, alpha, pairs)


@pytest.mark.parametrize("kind", ["all layers", "some layers", "mixed ranks", "float16"])
@pytest.mark.parametrize("alpha", [0.0, 16.0, float(np.float32(0.3)), -2.0])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gguf_to_peft_to_gguf_is_exact(
    arch: str, alpha: float, kind: str, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    model = tiny(arch)
    _foreign(model, alpha, kind).save(tmp_path / "foreign.gguf")
    original = Adapter.load(tmp_path / "foreign.gguf")
    to_peft(tmp_path / "foreign.gguf", model.gguf_path, tmp_path / "peft")
    convert(tmp_path / "peft", model.gguf_path, tmp_path / "again.gguf")
    again = Adapter.load(tmp_path / "again.gguf")
    ordered = {name: original.pairs[name] for name in again.pairs}
    assert_same_pairs(replace(original, pairs=ordered), again)
    assert set(ordered) == set(original.pairs)


@pytest.mark.parametrize("kind", ["all layers", "some layers", "mixed ranks"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "phi3"])
def test_peft_itself_reads_the_folder_alike(
    arch: str, kind: str, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    model = tiny(arch)
    for alpha in (0.0, 6.0):
        adapter = _foreign(model, alpha, kind)
        adapter.save(tmp_path / "foreign.gguf")
        folder = tmp_path / f"peft-{alpha}"
        to_peft(tmp_path / "foreign.gguf", model.gguf_path, folder)
        _assert_peft_reads(folder, model, adapter)


def _assert_peft_reads(folder: Path, model: tiny_models.TinyModel, adapter: Adapter) -> None:
    names = BaseNames(GGUFFile(model.gguf_path))
    deltas = {names.tensor(module): delta for module, delta in peft_deltas(model, folder).items()}
    assert set(deltas) == set(adapter.pairs)
    for name, delta in deltas.items():
        assert name is not None
        got = names.to_hf_rows(name, adapter.delta(name))
        assert relative_error(got, delta) <= 1e-5


# -- a record that no longer holds ----------------------------------------


def _changed(adapter: Adapter, change: str) -> Adapter:
    config = json.loads(adapter.extra["safegene.peft.config"])
    records: dict[str, dict[str, Any]] = {
        "a config of DoRA": {"safegene.peft.config": json.dumps(config | {"use_dora": True})},
        "another alpha": {"safegene.peft.config": json.dumps(config | {"lora_alpha": 99})},
        "no config": {"safegene.peft.config": "{"},
        "config of another kind": {"safegene.peft.config": 7},
        "unknown types": {"safegene.peft.dtype": "F9/F9"},
        "types of another kind": {"safegene.peft.dtype": 5},
        "folded pairs of another kind": {"safegene.peft.folded": 7},
        "a folded pair that was not": {"safegene.peft.folded": [next(iter(adapter.pairs))]},
        "module names": {"safegene.peft.modules": ["x"] * len(adapter.pairs)},
    }
    if change == "scaled":
        return adapter.scaled(0.3)
    if change == "one layer":
        return adapter.only([1])
    if change == "in part scaled":
        return adapter.scaled({0: 2.0, 1: 0.7})
    return replace(adapter, extra={**adapter.extra, **records[change]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        "scaled", "one layer", "in part scaled", "a config of DoRA", "another alpha", "no config",
        "config of another kind", "unknown types", "types of another kind",
        "folded pairs of another kind", "a folded pair that was not", "module names",
    ],
)  # fmt: skip
def test_a_changed_adapter_is_not_given_its_old_config(
    change: str,
    dtype: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    model = tiny("llama")
    folder = tiny_adapter("llama", alpha_pattern={"q_proj": 7}, dtype=dtype)
    adapter = _changed(convert(folder, model.gguf_path), change)
    adapter.save(tmp_path / "changed.gguf")
    to_peft(tmp_path / "changed.gguf", model.gguf_path, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / FILES[0]).read_text())
    assert not config.get("use_dora")
    _assert_peft_reads(tmp_path / "peft", model, adapter)
    again = convert(tmp_path / "peft", model.gguf_path)
    assert_same_pairs(adapter, again, steps=2)  # one each way, where a factor was folded


# -- what is refused ------------------------------------------------------


@pytest.fixture
def gguf_adapter(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> Path:
    convert(tiny_adapter("llama"), tiny("llama").gguf_path, tmp_path / "adapter.gguf")
    return tmp_path / "adapter.gguf"


def test_folders_that_cannot_be_made(
    gguf_adapter: Path, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    for output in (full, gguf_adapter, tmp_path / "no" / "peft"):
        with pytest.raises(OutputError):
            to_peft(gguf_adapter, tiny("llama").gguf_path, output)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.gguf", "full"]


def test_an_empty_folder_will_do(
    gguf_adapter: Path, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    (tmp_path / "peft").mkdir()
    to_peft(gguf_adapter, tiny("llama").gguf_path, tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == sorted(FILES)


def test_nothing_is_left_when_writing_fails(
    gguf_adapter: Path,
    tiny: tiny_models.ModelFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safegene_edge.converters.safetensors_file.write", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        to_peft(gguf_adapter, tiny("llama").gguf_path, tmp_path / "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]


def test_inputs_that_do_not_belong_together(
    gguf_adapter: Path, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(gguf_adapter.read_bytes()[:-200])
    cases: list[tuple[Path, Path, type[SafeGeneError]]] = [
        (gguf_adapter, tiny("qwen2").gguf_path, MismatchError),
        (gguf_adapter, tiny("llama", num_hidden_layers=2).gguf_path, MismatchError),
        (gguf_adapter, gguf_adapter, FileFormatError),
        (tiny("llama").gguf_path, tiny("llama").gguf_path, FileFormatError),
        (truncated, tiny("llama").gguf_path, FileFormatError),
    ]
    for adapter, base, kind in cases:
        with pytest.raises(kind):
            to_peft(adapter, base, tmp_path / "peft")
        assert not (tmp_path / "peft").exists()
