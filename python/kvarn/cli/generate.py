"""`kvarn generate`: a model answers a prompt through a chosen KV cache, and the cost is shown."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvarn
from kvarn.cli.console import errors, print_json, results
from kvarn.models import DTYPES, LoadedModel, load, require

if TYPE_CHECKING:
    from kvarn.eval import Arm

DENSE = ("fp32", "bf16", "fp16")
DEFAULT_CACHE = "kvarn_k4v2_g128"
DEFAULT_PROMPT = "Explain in three sentences what a KV cache is good for."


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `kvarn`."""
    parser = commands.add_parser(
        "generate",
        help="answer a prompt through a KVarN cache",
        description="Stream a model's answer through a KV cache, then show speed and memory.",
    )
    parser.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT, metavar="PROMPT", help="the prompt")
    parser.add_argument(
        "--file", type=Path, metavar="TEXT", help="a text to put before the prompt, which asks about it"
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a transformers folder, GGUF file or hub id (default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help=f"type the model computes in (default: {DTYPES[0]})",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default=DEFAULT_CACHE,
        metavar="NAME",
        help=f"a preset of `kvarn presets`, or {', '.join(DENSE)} (default: {DEFAULT_CACHE})",
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="longest answer (default: 128)"
    )
    parser.add_argument(
        "--temperature", type=_not_negative, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--raw", action="store_true", help="no chat template, even where the model has one")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="run 16 bit, KVarN as published and KVarN with refit side by side",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of text and tables"
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Job:
    """A loaded model with the prompt's tokens, and how to answer."""

    loaded: LoadedModel
    prompt: list[int]
    max_new_tokens: int
    temperature: float
    seed: int


def run(arguments: argparse.Namespace) -> None:
    """Answer the prompt."""
    text = _prompt_text(arguments.prompt, arguments.file)
    name = arguments.kv_cache_dtype
    if arguments.compare:
        if name in DENSE:
            raise kvarn.KvarnError(
                f"--kv-cache-dtype {name}: --compare needs a KVarN preset; see `kvarn presets`"
            )
        if arguments.temperature:
            raise kvarn.KvarnError(
                f"--temperature {arguments.temperature:g}: --compare is greedy; leave it out"
            )
    if name not in DENSE:
        # Says so before a model is loaded if there is no such preset.
        kvarn.Config(name, head_dim=128)
    require("torch", "transformers")
    with errors().status("loading the model"):
        loaded = load(arguments.model, dtype=arguments.dtype)
    prompt = encode_prompt(loaded, text, chat=not arguments.raw)
    _check_length(loaded, len(prompt), arguments.max_new_tokens)
    job = Job(loaded, prompt, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    if arguments.compare:
        from kvarn.cli.compare import compare

        compare(job, name, as_json=arguments.json)
    else:
        _answer(job, name, as_json=arguments.json)


def _answer(job: Job, name: str, *, as_json: bool) -> None:
    from kvarn.cli.generation import generate, warm_up
    from kvarn.cli.report import run_rows, run_table
    from kvarn.eval import dense_arm, kvarn_arm

    arm: Arm = dense_arm(name) if name in DENSE else kvarn_arm(name)
    warm_up(job)
    if as_json:
        print_json(run_rows([generate(job, arm)], job)[0])
        return

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    made = generate(job, arm, on_text=write)
    sys.stdout.write("\n\n")
    results().print(run_table([made], job))


def encode_prompt(loaded: LoadedModel, text: str, *, chat: bool) -> list[int]:
    """The prompt's tokens, through the model's chat template if it has one and `chat` asks for it."""
    tokenizer = loaded.tokenizer
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(text)["input_ids"])


def _prompt_text(prompt: str, file: Path | None) -> str:
    if file is None:
        return prompt
    try:
        context = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise kvarn.KvarnError(f"--file {str(file)!r}: {reason}") from error
    return f"{context.rstrip()}\n\n{prompt}"


def _check_length(loaded: LoadedModel, prompt: int, new: int) -> None:
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if prompt == 0:
        raise kvarn.KvarnError("prompt of 0 tokens: expected at least 1")
    if limit is not None and prompt + new > limit:
        raise kvarn.KvarnError(
            f"{prompt} prompt + {new} new tokens: the model's context is {limit}; "
            "shorten the text or lower --max-new-tokens"
        )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number of at least 0")
    return value
