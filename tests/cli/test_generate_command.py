"""`trtkit generate` and `trtkit chat`, called as the console script calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_bundle
from support.engine_models import hf_greedy, make_hf, spec_of, trtllm_tensors
from typer.testing import CliRunner

from trtkit.cli.app import build_app
from trtkit.cli.generate_run import Chat, parse_ids
from trtkit.engine.open import open_embedded
from trtkit.spec.bundle import open_bundle
from trtkit.spec.engine import Sampling
from trtkit.spec.errors import EngineError, UsageError


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_hf()


@pytest.fixture(scope="module")
def engine_dir(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("builds") / "tiny.engine"
    write_bundle(path, spec_of(hf), trtllm_tensors(hf))
    return path


def _run(*args: str) -> Any:
    return CliRunner().invoke(build_app({args[0]}), list(args))


def test_json_gives_the_greedy_tokens_of_the_model(hf: Any, engine_dir: Path) -> None:
    result = _run("generate", str(engine_dir), "--prompt-ids", "5,6,7", "--max-tokens", "8", "--ignore-eos", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["output_ids"] == hf_greedy(hf, (5, 6, 7), 8)
    assert answer["prompt_ids"] == [5, 6, 7]
    assert (answer["finish"], answer["text"], answer["kv_policy"]) == ("length", None, "full")


def test_people_get_ids_where_there_is_no_tokenizer(hf: Any, engine_dir: Path) -> None:
    result = _run("generate", str(engine_dir), "--prompt-ids", "5 6 7", "--max-tokens", "3", "--ignore-eos")
    assert result.stdout.strip() == ",".join(map(str, hf_greedy(hf, (5, 6, 7), 3)))


def test_a_seed_makes_sampling_repeatable(engine_dir: Path) -> None:
    flags = ("generate", str(engine_dir), "--prompt-ids", "5", "--max-tokens", "12", "--temperature", "2")
    outputs = [_run(*flags, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_stop_id_ends_the_answer(hf: Any, engine_dir: Path) -> None:
    tokens = hf_greedy(hf, (5, 6, 7), 8)
    flags = ("--prompt-ids", "5,6,7", "--max-tokens", "8", "--ignore-eos", "--stop-ids", f"95,{tokens[2]}", "--json")
    answer = json.loads(_run("generate", str(engine_dir), *flags).stdout)
    assert answer["finish"] == "stop"
    assert answer["output_ids"] == tokens[: tokens.index(tokens[2]) + 1]


def test_a_policy_of_the_command_line_evicts(engine_dir: Path) -> None:
    flags = ("--prompt-ids", ",".join(["5"] * 30), "--max-tokens", "20", "--ignore-eos", "--kv", "window:8", "--json")
    answer = json.loads(_run("generate", str(engine_dir), *flags).stdout)
    assert answer["kv_policy"] == "window:budget=8"
    assert answer["evictions"] > 0


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no prompt": ([], 2, "give one prompt"),
    "two prompts": (["--prompt", "a", "--prompt-ids", "1"], 2, "give one prompt"),
    "not an id": (["--prompt-ids", "1,x"], 2, "--prompt-ids: 'x' is not a token id"),
    "unknown id": (["--prompt-ids", "96"], 2, "ids 0 to 95"),
    "too long": (["--prompt-ids", ",".join(["5"] * 64)], 2, "max_seq_len is 64"),
    "no tokenizer": (["--prompt", "hello"], 3, "no tokenizer"),
    "bad policy": (["--prompt-ids", "1", "--kv", "h2o:0"], 2, "must be at least 1"),
    "no such policy": (["--prompt-ids", "1", "--kv", "nope:8"], 2, "nope"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_an_exit_code(engine_dir: Path, name: str) -> None:
    flags, code, line = WRONG[name]
    result = _run("generate", str(engine_dir), *flags)
    assert result.exit_code == code, result.output
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_an_engine_that_is_not_there_is_exit_code_8(tmp_path: Path) -> None:
    assert _run("generate", str(tmp_path / "no.engine"), "--prompt-ids", "1").exit_code == 8
    assert _run("chat", str(tmp_path / "no.engine")).exit_code == 8


def test_ids_may_be_separated_by_commas_or_spaces() -> None:
    assert parse_ids("--x", "1, 2 3,") == (1, 2, 3)
    with pytest.raises(UsageError, match="--x: '-1'"):
        parse_ids("--x", "-1")


class LetterTokenizer:
    """One id per letter; decodes id 90 to half a character."""

    vocab_size, bos_id, eos_id, chat_template = 96, None, None, None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % 90 for c in text]

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        return "".join("\ufffd" if i == 90 else chr(33 + i) for i in ids)

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        return "\n".join(m["content"] for m in messages)

    def chat_ids(self, messages: Any) -> list[int]:
        return self.encode(self.render_chat(messages))


def _chat(engine_dir: Path, max_tokens: int = 6) -> Chat:
    engine = open_embedded(open_bundle(engine_dir))
    return Chat(engine=engine, tokenizer=LetterTokenizer(), max_tokens=max_tokens, sampling=Sampling())


def test_an_answer_is_streamed_and_remembered(engine_dir: Path) -> None:
    chat, pieces = _chat(engine_dir), []
    chat.ask("hi", pieces.append)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert len(pieces) > 1
    assert "".join(pieces) == chat.messages[1]["content"]


def test_ctrl_c_ends_the_answer_and_the_chat_goes_on(engine_dir: Path) -> None:
    chat, pieces = _chat(engine_dir, 40), []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    chat.ask("hi", interrupt)
    assert len(pieces) == 2
    assert chat.engine.kv_stats().blocks_used == 0
    chat.ask("go on", pieces.append)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_a_conversation_that_is_too_long_is_said_and_the_question_taken_back(engine_dir: Path) -> None:
    chat = _chat(engine_dir)
    with pytest.raises(EngineError, match="max_seq_len is 64"):
        chat.ask("x" * 80, lambda piece: None)
    assert chat.messages == []


def test_half_a_character_waits_for_the_rest() -> None:
    from trtkit.cli.generate_run import _next_piece

    tokenizer = LetterTokenizer()
    assert _next_piece(tokenizer, [1, 90], '"', final=False) == ("", '"')
    assert _next_piece(tokenizer, [1, 90], '"', final=True) == ("\ufffd", '"\ufffd')


def test_chat_with_json_answers_each_line_with_one_object(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtkit.cli.generate_run.load_tokenizer", lambda _: LetterTokenizer())
    arguments = ["chat", str(engine_dir), "--max-tokens", "4", "--temperature", "0", "--json"]
    result = CliRunner().invoke(build_app({"chat"}), arguments, input=f"hi\n\n{'x' * 80}\n/exit\nunread\n")
    assert result.exit_code == 0, result.output
    answered, refused = (json.loads(line) for line in result.stdout.splitlines())
    assert (answered["user"], answered["error"]) == ("hi", None)
    assert answered["assistant"]
    assert refused["assistant"] == ""
    assert "max_seq_len" in refused["error"]
