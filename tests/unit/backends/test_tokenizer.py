"""The tokenizer loader: round trips, specials, chat, and one line for whatever is wrong with the files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from trtkit.backends.tokenizer import load_tokenizer
from trtkit.spec.errors import InputError

BOS, EOS = "<s>", "</s>"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json with BOS 0 and EOS 1 and one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make_directory(path: Path, tokenizer_file: Path, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    body = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(body))
    return path


def test_any_text_survives_encoding_and_decoding(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(make_directory(tmp_path, tokenizer_file))
    text = "def f(x):\n\treturn 'żółć 🙂'  # two  spaces ,  odd\x00byte\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_is_added_unless_declined(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(make_directory(tmp_path, tokenizer_file))
    assert tokenizer.encode("ab")[0] == tokenizer.bos_id == 0
    assert tokenizer.encode("ab")[1:] == tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.eos_id == 1
    assert tokenizer.vocab_size == 258


def test_special_tokens_are_hidden_unless_asked_for(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(make_directory(tmp_path, tokenizer_file))
    ids = [*tokenizer.encode("ab"), 1]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == f"{BOS}ab{EOS}"


def test_half_a_character_decodes_to_the_replacement_character(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(make_directory(tmp_path, tokenizer_file))
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "�"


def test_chat_follows_the_models_template_without_a_second_bos(tmp_path: Path, tokenizer_file: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    tokenizer = load_tokenizer(make_directory(tmp_path, tokenizer_file, chat_template=template))
    ids = tokenizer.chat_ids([{"role": "user", "content": "hi"}])
    assert tokenizer.chat_template == template
    assert ids.count(0) == 1
    assert tokenizer.decode(ids, skip_special=False) == f"{BOS}[user]hi>"


def test_chat_without_a_template_is_plain_text(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(make_directory(tmp_path, tokenizer_file))
    assert tokenizer.chat_template is None
    ids = tokenizer.chat_ids([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "be brief\nhi\n"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{% for %}", "{{ messages[7].x.y }}"]
)
def test_a_template_that_refuses_or_is_broken_is_one_line(tmp_path: Path, tokenizer_file: Path, template: str) -> None:
    tokenizer = load_tokenizer(make_directory(tmp_path, tokenizer_file, chat_template=template))
    with pytest.raises(InputError, match="chat template refused") as caught:
        tokenizer.chat_ids([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


def test_tokenizer_json_alone_is_enough(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("ab", add_special_tokens=False)) == "ab"


def test_a_directory_without_a_tokenizer_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer \(one of tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}'])
def test_corrupt_tokenizer_files_are_one_line(tmp_path: Path, tokenizer_file: Path, content: bytes) -> None:
    directory = make_directory(tmp_path, tokenizer_file)
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="the tokenizer cannot be read") as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path: Path, tokenizer_file: Path) -> None:
    directory = make_directory(
        tmp_path, tokenizer_file, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
    )
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(InputError):
        load_tokenizer(directory)
    assert not (tmp_path / "ran").exists()
